"""What stands between the products of a decoder, row by row: norms, gates, rotation and the cache.

Here are the calls and the references; ``decoder_rows_triton.py`` does the same on a GPU, a launch each, and
``decoder_rows_cpu.py`` on a CPU in FP32. All round where a Transformers model rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from grace_vlm.kernels import decoder_rows_cpu, runs_triton
from grace_vlm.kernels.cache_rows import put_rows
from grace_vlm.kernels.heads import Heads


@dataclass(frozen=True)
class Norm:
    """An RMS norm: ``weight`` (d,), ``epsilon``. The weight must be complete before it is used (``starts_early``)."""

    weight: torch.Tensor
    epsilon: float


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """x / rms(x) over the last axis, FP32 inside, rounded before the weight; in the dtype of x."""
    if x.ndim == 2 and runs_triton(x):
        from grace_vlm.kernels.decoder_rows_triton import rms_norm as fused

        return fused(x.contiguous(), norm.weight, norm.epsilon)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)
    return norm.weight.to(x.dtype) * scaled.to(x.dtype)


def gated(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of each row, (n, 2 d) -> (n, d)."""
    if runs_triton(x):
        from grace_vlm.kernels.decoder_rows_triton import gated as fused

        return fused(x)
    if decoder_rows_cpu.takes_gates(x):
        return decoder_rows_cpu.gated(x)
    return gated_reference(x)


def gated_reference(x: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def rotate_append(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Heads,
) -> torch.Tensor:
    """(n, H, D) queries of (n, (H + 2 KV) D), normalised and turned; keys and values go to the cache.

    Args:
        rotation: cos and sin, (n, D) each. slots: (n,) int64, where in keys and values, (slots, KV, D) each,
            in the dtype of qkv or E4M3 (``cache_rows``).
    """
    if runs_triton(qkv):
        from grace_vlm.kernels.decoder_rows_triton import rotate_append as fused

        return fused(qkv, rotation, slots, keys, values, heads)
    if decoder_rows_cpu.takes_heads(qkv, keys, values, heads):
        return decoder_rows_cpu.rotate_append(qkv, rotation, slots, keys, values, heads)
    return rotate_append_reference(qkv, rotation, slots, keys, values, heads)


def rotate_append_reference(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Heads,
) -> torch.Tensor:
    """The same in torch."""
    h, kv = heads.num_heads, heads.num_kv_heads
    query, key, value = qkv.view(len(qkv), h + 2 * kv, heads.head_dim).split([h, kv, kv], dim=1)
    if heads.query_norm is not None and heads.key_norm is not None:
        query = rms_norm(query, Norm(heads.query_norm, heads.epsilon))
        key = rms_norm(key, Norm(heads.key_norm, heads.epsilon))
    cos, sin = (part.unsqueeze(1) for part in rotation)
    put_rows(keys, slots, _rotated(key, cos, sin))
    put_rows(values, slots, value)
    return _rotated(query, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (n, heads, d): the first half turns with the second; cos, sin (n, 1, d)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
