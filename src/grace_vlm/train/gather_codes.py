"""Leaves on a grid gathered as codes and scales: a half byte a weight on its way instead of two (``runtime.gather``).

Every process reads the codes of its rows off its leaf, which is bf16(q s) and holds them exactly, packs two of up to
four bits into a byte, and gathers one buffer of codes and one of scales for all weights of a scheme; the others' rows
are then baked as their owner baked them. For Qwen3-VL-2B in W4 the leaves' 3.5 GB become 1.4 (words and norms stay in
BF16), at the price of some ten passes over the weights: for cards between machines, not for NVLink (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from grace_vlm.quant.affine import dequantize, quantize
from grace_vlm.quant.packing import to_signed
from grace_vlm.train.grids import Grids
from grace_vlm.train.ranks import Ranks


@torch.no_grad()
def gather_codes_(grids: Grids, leaf_of: Callable[[str], torch.Tensor], ranks: Ranks) -> None:
    """Write the other processes' rows of every leaf of ``grids``, whose own rows have been written.

    Args:
        grids: of this process's rows. leaf_of: the whole leaf (out, in), by the name of its weight.
    """
    scales = grids.scales_in_use()
    packed = [_packed(quantize(w.leaf, scale, grids.scheme), grids.scheme.num_bits) for w, scale in scales]
    all_codes = _gathered(torch.cat(packed), ranks)
    # Rounded to BF16 before they were used, and so exact in it.
    dtype = scales[0][1].dtype if grids.scheme.scale_rounding == "fp32" else torch.bfloat16
    all_scales = _gathered(torch.cat([scale.flatten() for _, scale in scales]).to(dtype), ranks)
    sizes = [[part.numel() for part in packed], [scale.numel() for _, scale in scales]]
    parts = zip(scales, all_codes.split(sizes[0], dim=1), all_scales.split(sizes[1], dim=1), strict=True)
    for (w, scale), code_part, scale_part in parts:
        leaf = leaf_of(w.name)
        own = ranks.share_of(leaf)
        assert own is not None
        codes = _unpacked(code_part, leaf.shape)
        whole_scale = scale_part.reshape(leaf.shape[0], scale.shape[1])
        for rows in (slice(0, own.start), slice(own.stop, leaf.shape[0])):
            leaf[rows] = dequantize(codes[rows], whole_scale[rows], torch.bfloat16).to(leaf.dtype)


def _gathered(own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """(processes, n) of every process's (n,)."""
    found = own.new_empty(ranks.count, own.numel())
    found[ranks.index] = own
    return ranks.gather_shares_(found)


def _packed(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """(n,) uint8 of int8 codes, two to a byte where they fit: the first half of a share in the low bits."""
    unsigned = codes.flatten().view(torch.uint8)
    if num_bits > 4 or len(unsigned) % 2:
        return unsigned
    low, high = (unsigned + 8).chunk(2)
    return low | (high << 4)


def _unpacked(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Codes (out, in) int8, of (processes, n) that ``_packed`` made of their rows."""
    if packed.numel() == shape.numel():
        return packed.reshape(shape).view(torch.int8)
    return to_signed(torch.cat([packed & 15, packed >> 4], dim=1), 4).reshape(shape)
