"""``packed_rows`` in Triton: a program is a row and a share of its inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grace_vlm.kernels.fragments import PackedLinear

BLOCK = 1024
"""Words of a program, two inputs each."""


@triton.jit
def _rows(words, scale, ids, out, steps, groups, group_size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + number)
    tile, r, g = row // 16, (row // 8 % 2).to(tl.int32), row % 8
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < WIDTH
    pairs = tl.load(words + (tile * steps + j // 16) * 128 + g * 16 + j % 16, mask=inside, other=0) >> (16 * r)
    by = tl.load(scale + (tile * groups + 2 * j // group_size) * 16 + 2 * g + r, mask=inside, other=0.0).to(tl.float32)
    even = ((pairs & 255) - 128).to(tl.float32) * by
    odd = (((pairs >> 8) & 255) - 128).to(tl.float32) * by
    to = out + number * 2 * WIDTH + 2 * j
    tl.store(to, even.to(out.dtype.element_ty), mask=inside)
    tl.store(to + 1, odd.to(out.dtype.element_ty), mask=inside)


def packed_rows(packed: PackedLinear, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, in) of 8-bit rows ``ids`` (n,) int64."""
    out = torch.empty(len(ids), packed.in_features, dtype=dtype, device=packed.device)
    width = packed.in_features // 2
    if len(ids):
        _rows[(len(ids), triton.cdiv(width, BLOCK))](
            packed.words, packed.scale, ids, out, packed.words.shape[1], packed.scale.shape[1], packed.group_size,
            WIDTH=width, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
