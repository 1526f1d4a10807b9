"""``paged_attention`` in Triton.

A program is a request, a key head and a share of the context (``SPLITS`` shares); shares are put together in a fixed
order by a second kernel, or by none where there is one share. The last share has the new token: it makes its key,
writes it and its value to the cache, and adds them from registers, so nobody waits for the write. Shares are blocks of
the context's length alone, so a request's result does not depend on what runs beside. A share's first block is on its
way to the second cache while the kernel before ends.

Numbers are rounded where a Transformers model rounds them: after the norm, after its weight, after the rotation; keys
and values once more, to what the cache keeps, the new token's too, so that it sees itself as others will see it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grace_vlm.kernels.cache_rows_triton import as_kept
from grace_vlm.kernels.early_triton import early, to_second_cache, wait_for_earlier
from grace_vlm.kernels.heads import BLOCK, Heads


@triton.jit
def _normed(low, high, weight, d, epsilon, D: tl.constexpr, DTYPE: tl.constexpr):
    """Halves (rows, D/2) in FP32 -> the same after an RMS norm."""
    factor = 1.0 / tl.sqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D + epsilon)
    low = (low * factor[:, None]).to(DTYPE).to(tl.float32) * tl.load(weight + d).to(tl.float32)[None, :]
    high = (high * factor[:, None]).to(DTYPE).to(tl.float32) * tl.load(weight + D // 2 + d).to(tl.float32)[None, :]
    return low.to(DTYPE).to(tl.float32), high.to(DTYPE).to(tl.float32)


@triton.jit
def _share(length, share, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Its first token and the one behind its last, in whole blocks of the context."""
    each = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    begin = share * each
    return begin, tl.minimum(begin + each, length)


@triton.jit
def _ask_for(
    begin, end, line, keys, values, PAGE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block's keys and values, for the second cache."""
    token = tl.maximum(tl.minimum(begin + tl.arange(0, BLOCK), end - 1), 0)
    at = (tl.load(line + token // PAGE).to(tl.int64) * PAGE + token % PAGE) * STRIDE
    num_bytes: tl.constexpr = D * keys.dtype.element_ty.primitive_bitwidth // 8
    to_second_cache(keys + at, num_bytes)
    to_second_cache(values + at, num_bytes)


@triton.jit
def _decode(
    qkv, cos, sin, query_norm, key_norm, keys, values, table, lengths, out, parts, stats,
    epsilon, scale, table_stride,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    KEPT: tl.constexpr = keys.dtype.element_ty
    HALF: tl.constexpr = D // 2
    REPEATS: tl.constexpr = H // KV
    request, kv, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, d, full = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, D)
    if EARLY:
        # What is asked for too early, by a length that is still to grow, is another block: nothing is computed with it.
        begin, end = _share(tl.load(lengths + request), share, SPLITS, BLOCK)
        _ask_for(begin, end, table + request * table_stride, keys + kv * D, values + kv * D, PAGE, KV * D, D, BLOCK)
    wait_for_earlier(EARLY)
    length = tl.load(lengths + request, volatile=True)
    begin, end = _share(length, share, SPLITS, BLOCK)
    is_head = row < REPEATS
    own = qkv + request.to(tl.int64) * (H + 2 * KV) * D
    at_query = own + (kv * REPEATS + row)[:, None] * D + d[None, :]
    query_low = tl.load(at_query, mask=is_head[:, None], other=0.0).to(tl.float32)
    query_high = tl.load(at_query + HALF, mask=is_head[:, None], other=0.0).to(tl.float32)
    if HAS_NORM:
        query_low, query_high = _normed(query_low, query_high, query_norm, d, epsilon, D, DTYPE)
    turn = request * D + d
    cos_low, cos_high = tl.load(cos + turn).to(tl.float32)[None, :], tl.load(cos + turn + HALF).to(tl.float32)[None, :]
    sin_low, sin_high = tl.load(sin + turn).to(tl.float32)[None, :], tl.load(sin + turn + HALF).to(tl.float32)[None, :]
    turned_low = (query_low * cos_low - query_high * sin_low).to(DTYPE)
    turned_high = (query_high * cos_high + query_low * sin_high).to(DTYPE)

    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D), tl.float32)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < end
        page = tl.load(table + request * table_stride + token // PAGE, mask=inside, other=0).to(tl.int64)
        at = ((page * PAGE + token % PAGE) * KV + kv) * D
        key_low = tl.load(keys + at[None, :] + d[:, None], mask=inside[None, :], other=0.0).to(DTYPE)
        key_high = tl.load(keys + at[None, :] + HALF + d[:, None], mask=inside[None, :], other=0.0).to(DTYPE)
        scores = (tl.dot(turned_low, key_low) + tl.dot(turned_high, key_high)) * scale
        scores = tl.where(inside[None, :], scores, -1e30)
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        shares = tl.where(inside[None, :], tl.exp(scores - higher[:, None]), 0.0)
        fade = tl.exp(largest - higher)
        value = tl.load(values + at[:, None] + full[None, :], mask=inside[:, None], other=0.0).to(DTYPE)
        sums = sums * fade[:, None] + tl.dot(shares.to(DTYPE), value)
        total = total * fade + tl.sum(shares, axis=1)
        largest = higher

    if share == SPLITS - 1:
        at_key = own + (H + kv) * D + d[None, :] + tl.zeros((1, 1), tl.int32)
        key_low, key_high = tl.load(at_key).to(tl.float32), tl.load(at_key + HALF).to(tl.float32)
        if HAS_NORM:
            key_low, key_high = _normed(key_low, key_high, key_norm, d, epsilon, D, DTYPE)
        new_low = as_kept((key_low * cos_low - key_high * sin_low).to(DTYPE).to(tl.float32), KEPT)
        new_high = as_kept((key_high * cos_high + key_low * sin_high).to(DTYPE).to(tl.float32), KEPT)
        new_value = as_kept(tl.load(own + (H + KV + kv) * D + full[None, :]).to(tl.float32), KEPT)
        page = tl.load(table + request * table_stride + length // PAGE).to(tl.int64)
        at = ((page * PAGE + length % PAGE) * KV + kv) * D
        tl.store(keys + at + d[None, :], new_low)
        tl.store(keys + at + HALF + d[None, :], new_high)
        tl.store(values + at + full[None, :], new_value)
        score = tl.sum(turned_low.to(tl.float32) * new_low.to(tl.float32), axis=1)
        score = (score + tl.sum(turned_high.to(tl.float32) * new_high.to(tl.float32), axis=1)) * scale
        higher = tl.maximum(largest, score)
        fade, weight = tl.exp(largest - higher), tl.exp(score - higher)
        sums = sums * fade[:, None] + weight[:, None] * new_value.to(tl.float32)
        total = total * fade + weight
        largest = higher

    head = request * H + kv * REPEATS + row
    if SPLITS == 1:
        result = sums / total[:, None]
        tl.store(
            out + head.to(tl.int64)[:, None] * D + full[None, :], result.to(out.dtype.element_ty), mask=is_head[:, None]
        )
    else:
        place = head * SPLITS + share
        tl.store(parts + place.to(tl.int64)[:, None] * D + full[None, :], sums, mask=is_head[:, None])
        tl.store(stats + 2 * place, largest, mask=is_head)
        tl.store(stats + 2 * place + 1, total, mask=is_head)


@triton.jit
def _merge(parts, stats, out, D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr):
    wait_for_earlier(EARLY)
    head = tl.program_id(0).to(tl.int64)
    share, full = tl.arange(0, SPLITS), tl.arange(0, D)
    largest = tl.load(stats + 2 * (head * SPLITS + share))
    weight = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(weight * tl.load(stats + 2 * (head * SPLITS + share) + 1), axis=0)
    sums = tl.load(parts + (head * SPLITS + share)[:, None] * D + full[None, :])
    tl.store(out + head * D + full, (tl.sum(sums * weight[:, None], axis=0) / total).to(out.dtype.element_ty))


def decode(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    heads: Heads,
    page_tokens: int,
    splits: int,
) -> torch.Tensor:
    """As ``paged_attention``."""
    count, (h, kv, d) = len(qkv), (heads.num_heads, heads.num_kv_heads, heads.head_dim)
    out = qkv.new_empty(count, h * d)
    parts = qkv.new_empty((count, h, splits, d) if splits > 1 else (1,), dtype=torch.float32)
    stats = qkv.new_empty((count, h, splits, 2) if splits > 1 else (1,), dtype=torch.float32)
    _decode[(count, kv, splits)](
        qkv, *rotation, heads.query_norm, heads.key_norm, keys, values, table, lengths, out, parts, stats,
        heads.epsilon, d**-0.5, table.stride(0),
        H=h, KV=kv, D=d, PAGE=page_tokens, SPLITS=splits, BLOCK=BLOCK, HAS_NORM=heads.query_norm is not None,
        ROWS=max(16, triton.next_power_of_2(h // kv)), num_warps=4, **early(qkv),
    )  # fmt: skip
    if splits > 1:
        _merge[(count * h,)](parts, stats, out, D=d, SPLITS=splits, num_warps=4, **early(qkv))
    return out
