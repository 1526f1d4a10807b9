"""``decoder_rows`` in Triton.

    rms_norm        (n, d) -> (n, d)                                   x / rms(x), rounded, times the weight
    gated           (n, 2 d) -> (n, d)                                 silu(first half), rounded, times the second
    rotate_append   (n, (H + 2 KV) D) -> (n, H, D), and the cache      norm of q and k, rotation; k and v to their slots

Each rounds where the reference rounds; what goes to the cache once more, to the cache's dtype (``cache_rows``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grace_vlm.kernels.cache_rows_triton import as_kept
from grace_vlm.kernels.early_triton import early, wait_for_earlier
from grace_vlm.kernels.heads import Heads


@triton.jit
def _rms_norm(x, weight, out, epsilon, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < SIZE
    by = tl.load(weight + column, mask=inside, other=0.0)
    wait_for_earlier(EARLY)
    wide = tl.load(x + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    scaled = (wide / tl.sqrt(tl.sum(wide * wide, axis=0) / SIZE + epsilon)).to(out.dtype.element_ty)
    tl.store(
        out + row * SIZE + column, (scaled.to(tl.float32) * by.to(tl.float32)).to(out.dtype.element_ty), mask=inside
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Of contiguous (n, d)."""
    out, size = torch.empty_like(x), x.shape[-1]
    if len(x):
        _rms_norm[(len(x),)](
            x, weight, out, epsilon, SIZE=size, BLOCK=triton.next_power_of_2(size), num_warps=4, **early(x)
        )  # fmt: skip
    return out


@triton.jit
def _gated(x, out, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_earlier(EARLY)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(x + 2 * row * size + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + (2 * row + 1) * size + column, mask=inside, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, (opened * value).to(out.dtype.element_ty), mask=inside)


def gated(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of each row times the second, (n, 2 d) -> (n, d)."""
    size = x.shape[1] // 2
    out = x.new_empty(len(x), size)
    if len(x):
        _gated[(len(x), triton.cdiv(size, 1024))](x, out, size, BLOCK=1024, num_warps=4, **early(x))
    return out


@triton.jit
def _rotate_append(
    qkv, cos, sin, query_norm, key_norm, slots, queries, keys, values, epsilon,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HAS_NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_earlier(EARLY)
    DTYPE: tl.constexpr = queries.dtype.element_ty
    KEPT: tl.constexpr = keys.dtype.element_ty
    HALF: tl.constexpr = D // 2
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, HALF)
    at = qkv + (row * (H + 2 * KV) + head) * D + d
    low, high = tl.load(at).to(tl.float32), tl.load(at + HALF).to(tl.float32)
    slot = tl.load(slots + row)
    if head >= H + KV:
        to = (slot * KV + head - H - KV) * D + d
        tl.store(values + to, as_kept(low, KEPT))
        tl.store(values + to + HALF, as_kept(high, KEPT))
    else:
        is_query = head < H
        if HAS_NORM:
            factor = 1.0 / tl.sqrt((tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / D + epsilon)
            weight = query_norm if is_query else key_norm
            low = (low * factor).to(DTYPE).to(tl.float32) * tl.load(weight + d).to(tl.float32)
            high = (high * factor).to(DTYPE).to(tl.float32) * tl.load(weight + HALF + d).to(tl.float32)
            low, high = low.to(DTYPE).to(tl.float32), high.to(DTYPE).to(tl.float32)
        turn = row * D + d
        turned_low = low * tl.load(cos + turn).to(tl.float32) - high * tl.load(sin + turn).to(tl.float32)
        turned_high = high * tl.load(cos + turn + HALF).to(tl.float32) + low * tl.load(sin + turn + HALF).to(tl.float32)
        if is_query:
            to = (row * H + head) * D + d
            tl.store(queries + to, turned_low.to(DTYPE))
            tl.store(queries + to + HALF, turned_high.to(DTYPE))
        else:
            to = (slot * KV + head - H) * D + d
            tl.store(keys + to, as_kept(turned_low.to(DTYPE).to(tl.float32), KEPT))
            tl.store(keys + to + HALF, as_kept(turned_high.to(DTYPE).to(tl.float32), KEPT))


def rotate_append(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Heads,
) -> torch.Tensor:
    """(n, H, D) queries; keys and values go to ``slots`` (n,) int64 of (slots, KV, D)."""
    h, kv, d = heads.num_heads, heads.num_kv_heads, heads.head_dim
    queries = qkv.new_empty(len(qkv), h, d)
    if len(qkv):
        _rotate_append[(len(qkv), h + 2 * kv)](
            qkv, *(part.contiguous() for part in rotation), heads.query_norm, heads.key_norm, slots, queries, keys,
            values, heads.epsilon, H=h, KV=kv, D=d, HAS_NORM=heads.query_norm is not None, num_warps=1, **early(qkv),
        )  # fmt: skip
    return queries
