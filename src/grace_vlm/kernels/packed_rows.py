"""Single rows of a packed weight of 8 bits: how an embedding is looked up where the head multiplies with it.

In the layout of ``fragments.py`` row 16 tile + 8 r + g of a weight is 16 words of every block of 32 inputs,

    word j, j = 0..15   at (tile, block, 4 g + j // 4, j % 4), bytes 2 r and 2 r + 1: inputs 32 block + 2 j and + 1

so its bytes lie in the order of the inputs. Here are the call and the reference; ``packed_rows_triton.py`` does it on a
GPU in one launch.
"""

from __future__ import annotations

import torch

from grace_vlm.kernels import runs_triton
from grace_vlm.kernels.fragments import TILE, PackedLinear
from grace_vlm.quant.affine import dequantize


def packed_rows(packed: PackedLinear, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, in) q s of rows ``ids`` (n,) int64, multiplied in FP32 and rounded once to ``dtype``."""
    assert packed.num_bits == 8, "rows of four bits are nobody's embedding"
    if runs_triton(packed.words, ids):
        from grace_vlm.kernels.packed_rows_triton import packed_rows as fused

        return fused(packed, ids, dtype)
    return packed_rows_reference(packed, ids, dtype)


def packed_rows_reference(packed: PackedLinear, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same in torch."""
    tile, r, g = ids // TILE, ids // 8 % 2, ids % 8
    words = packed.words.view(len(packed.words), -1, 8, 16)[tile, :, g].flatten(1)
    pairs = words >> (16 * r).to(torch.int32).unsqueeze(1)
    codes = torch.stack([pairs & 255, (pairs >> 8) & 255], dim=-1).flatten(1) - 128
    return dequantize(codes, packed.scale[tile, :, g, r].float(), dtype)
