"""Move a scale across a product: what makes x is divided by s, what reads x is multiplied by s, W x stays.

    norm:    x = g * u          g' = g / s                     W' = W diag s
    linear:  x = f(A v + a)     A' = diag(1/s) A, a' = a / s   W' = W diag s     f linear in each channel

f is attention's averaging (v_proj -> o_proj) or the product with the gate (up_proj -> down_proj). Under grouped heads
several inputs of o_proj read one output of v_proj, and share its scale.

A published model stores g' and a' in BF16, so they are rounded here first and s becomes what that rounding left, g / g'
or a / a'. The pair then computes what it did, whatever s was asked for. A' and W' may have any value: their next stop
is the grid.
"""

from __future__ import annotations

from typing import Any

import torch


def channel_map(layer: Any, source: str, in_features: int) -> torch.Tensor | None:
    """Which output channel of ``source`` each of ``in_features`` inputs reads, (in,) int64; None if not known.

    Args:
        layer: a decoder layer. source: module name in it, a norm or a linear.
    """
    num_channels = layer.get_submodule(source).weight.shape[0]
    channels = torch.arange(num_channels)
    if num_channels == in_features:
        return channels
    head_dim = getattr(layer.self_attn, "head_dim", 0)
    if not source.endswith("v_proj") or not head_dim or in_features % num_channels or num_channels % head_dim:
        return None
    # Transformers' repeat_kv: query heads that follow each other share a key and value head.
    heads = channels.reshape(-1, head_dim)
    return heads.repeat_interleave(in_features // num_channels, dim=0).flatten()


@torch.no_grad()
def fold(source: Any, readers: list[Any], scale: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Divide what ``source`` makes by a scale near ``scale`` and multiply the columns of ``readers`` by it, in place.

    Args:
        source: a norm with a ``weight`` (c,), or a linear (c, ...) whose bias, if any, is (c,).
        readers: linears (out, in). scale: (c,) positive, in the dtype of the weights (FP32 or FP64).
        channels: (in,) int64, see ``channel_map``.

    Returns:
        (c,) the scale that was folded.
    """
    is_norm = source.weight.ndim == 1
    stored = source.weight if is_norm else source.bias
    if stored is not None:
        rounded = (stored / scale).to(torch.bfloat16).to(stored.dtype)
        left = stored / rounded
        # At 0 any scale does; where BF16 cannot hold the quotient, none but 1.
        scale = torch.where(torch.isfinite(left) & (left > 0), left, torch.where(stored == 0, scale, 1.0))
        # Not by division again: the quotient of the quotient may be a neighbour of the BF16 value.
        stored.copy_(torch.where((stored != 0) & (scale == left), rounded, stored))
    if not is_norm:
        source.weight /= scale.unsqueeze(1)
    for reader in readers:
        reader.weight *= scale[channels]
    return scale
