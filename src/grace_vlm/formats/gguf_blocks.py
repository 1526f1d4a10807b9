"""Q4_0 and Q8_0: blocks of 32 weights along in_features with one FP16 scale d, w = d q.

    Q4_0, 18 bytes   d, then 16 bytes: byte j is (q[j] + 8) | (q[j + 16] + 8) << 4
    Q8_0, 34 bytes   d, then 32 int8

A group of our grids is several blocks, each with the scale again. Codes are written, never made from weights: the
quantizer of ggml would choose other scales.
"""

from __future__ import annotations

import torch

from grace_vlm.formats.gguf_file import Q4_0, Kind

BLOCK = 32
_NO_SCALE = 2.0**-14
"""The smallest normal FP16, for a block without a scale: all of its weights are zero."""


def pack_blocks(codes: torch.Tensor, scale: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Bytes (out, in / 32 * bytes of a block), uint8.

    Args:
        codes: (out, in) int8. scale: (out, groups), every value exact in FP16.
    """
    rows = codes.shape[0]
    blocks = codes.reshape(rows, -1, BLOCK)
    d = scale.to(torch.float16).repeat_interleave(blocks.shape[1] // scale.shape[1], dim=1)
    if kind == Q4_0:
        shifted = (blocks + 8).view(torch.uint8)
        blocks = shifted[..., :16] | shifted[..., 16:] << 4
    return torch.cat([d.unsqueeze(-1).view(torch.uint8), blocks.view(torch.uint8)], dim=-1).reshape(rows, -1)


def unpack_blocks(raw: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (out, in) int8, d (out, in / 32) FP16) of the bytes of a matrix."""
    blocks = raw.reshape(raw.shape[0], -1, kind.num_bytes)
    d = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    data = blocks[..., 2:].contiguous()
    if kind == Q4_0:
        codes = torch.cat([data & 15, data >> 4], dim=-1).view(torch.int8) - 8
    else:
        codes = data.view(torch.int8)
    return codes.reshape(raw.shape[0], -1), d


def with_scales(codes: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same weights without the scale 0, which ggml gives a block of zeros and our grids do not have."""
    empty = (d == 0).repeat_interleave(BLOCK, dim=1)
    return codes.masked_fill(empty, 0), torch.where(d == 0, _NO_SCALE, d.float())
