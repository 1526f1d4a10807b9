"""Triton: the linear layer of 4 or 8 bits, and bf16(q s) of a weight, from the layout of ``fragments.py``.

The portable kernels: any GPU that Triton knows, any number of tokens. A word holds codes of two rows (g and g + 8) and
of neighbouring inputs, so a program keeps two tables of sums and multiplies once for every position in a word: the
inputs at that position, picked out of 8-byte (4 bits) or 4-byte loads of x, times the codes at that position. Nothing
is rearranged. As in ``low_bit_linear.cu`` a group's products are summed before its FP32 scale is applied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grace_vlm.kernels.fragments import BLOCK, SLAB, TILE, PackedLinear

TILES, NUM_WARPS = 2, 4
"""Row tiles of a program, and its warps."""


@triton.jit
def _scale(scale_ptr, row, group, FAR: tl.constexpr):
    """FP32 scales of rows g (FAR 0) or g + 8 of each tile; ``row``: where [tile, 0, g, 0] lies."""
    return tl.load(scale_ptr + row + group * 16 + FAR).to(tl.float32)


@triton.jit
def _linear(
    words_ptr,
    scale_ptr,
    x_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    num_tiles,
    width,
    steps,
    groups,
    per_group,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GIVEN: tl.constexpr,
    OPERAND: tl.constexpr,
):
    row = tl.arange(0, TILES * 8)
    tile = tl.minimum(tl.program_id(0) * TILES + row // 8, num_tiles - 1).to(tl.int64)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    word = tl.arange(0, 16)
    words = words_ptr + tile[:, None] * (steps * 128) + (row % 8)[:, None] * 16 + word[None, :]
    scales = tile * (groups * 16) + (row % 8) * 2
    if BITS == 4:  # x in fours: inputs 32 b + 8 t + 4 s; word 2 b + s of lane t
        place, block = 8 * ((word % 4) // 2) + 2 * (word // 4) + word % 2, (word % 4) // 2
    else:  # x in twos: inputs 8 t + 4 s + 2 p; word 2 s + p of lane t
        place, block = 4 * (word // 4) + word % 4, word * 0
    near = tl.zeros((TOKENS, TILES * 8), tl.float32)
    far = tl.zeros((TOKENS, TILES * 8), tl.float32)
    for step in range(steps):
        codes = tl.load(words + step * 128)
        at = step * 16 + place
        there = (token[:, None] < num_tokens) & (at[None, :] < width)
        given = tl.load(x_ptr + token[:, None] * width + at[None, :], mask=there, other=0)
        for part in tl.static_range(SPLIT):  # 2: the halves of a step may be of two groups
            near_part = tl.zeros((TOKENS, TILES * 8), tl.float32)
            far_part = tl.zeros((TOKENS, TILES * 8), tl.float32)
            for c in tl.static_range(16 // BITS):
                x = ((given >> (16 * c)) & 0xFFFF).to(tl.uint16).to(GIVEN, bitcast=True).to(OPERAND)
                if SPLIT == 2:
                    x = tl.where(block[None, :] == part, x, 0.0).to(OPERAND)
                if BITS == 4:
                    a = ((codes >> (8 * (c // 2) + 16 * (c % 2))) & 15) - 8
                    b = ((codes >> (8 * (c // 2) + 16 * (c % 2) + 4)) & 15) - 8
                else:
                    a = ((codes >> (8 * c)) & 255) - 128
                    b = ((codes >> (8 * c + 16)) & 255) - 128
                near_part = tl.dot(x, tl.trans(a.to(OPERAND)), near_part)
                far_part = tl.dot(x, tl.trans(b.to(OPERAND)), far_part)
            group = tl.minimum((step * SPLIT + part) // per_group, groups - 1)
            near += near_part * _scale(scale_ptr, scales, group, 0)[None, :]
            far += far_part * _scale(scale_ptr, scales, group, 1)[None, :]
    if HAS_BIAS:
        near += tl.load(bias_ptr + tile * 16 + row % 8).to(tl.float32)[None, :]
        far += tl.load(bias_ptr + tile * 16 + row % 8 + 8).to(tl.float32)[None, :]
    out = y_ptr + token[:, None] * (num_tiles * 16) + (tile * 16 + row % 8)[None, :]
    kept = (token[:, None] < num_tokens) & ((tl.program_id(0) * TILES + row // 8) < num_tiles)[None, :]
    tl.store(out, near.to(y_ptr.dtype.element_ty), mask=kept)
    tl.store(out + 8, far.to(y_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _dequantize(
    words_ptr,
    scale_ptr,
    out_ptr,
    first_tile,
    width,
    steps,
    groups,
    group_size,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
):
    tile, step = (tl.program_id(0) + first_tile).to(tl.int64), tl.program_id(1)
    row, word = tl.arange(0, 8), tl.arange(0, 16)
    codes = tl.load(words_ptr + (tile * steps + step) * 128 + row[:, None] * 16 + word[None, :])
    if BITS == 4:
        place = 8 * ((word % 4) // 2) + 2 * (word // 4) + word % 2
    else:
        place = 4 * (word // 4) + word % 4
    at = step * 16 + place
    group = tl.minimum(at * SIZE // group_size, groups - 1)
    scales = scale_ptr + (tile * groups + group)[None, :] * 16 + row[:, None] * 2
    for far in tl.static_range(2):
        scale = tl.load(scales + far).to(tl.float32)
        joined = tl.zeros((8, 16), tl.int64)
        for c in tl.static_range(SIZE):
            if BITS == 4:
                code = ((codes >> (8 * (c // 2) + 16 * (c % 2) + 4 * far)) & 15) - 8
            else:
                code = ((codes >> (8 * c + 16 * far)) & 255) - 128
            bits = (code.to(tl.float32) * scale).to(tl.int32, bitcast=True)
            # To the nearest BF16, half to even, by hand: Triton's interpreter cuts.
            value = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            joined |= (value.to(tl.int64) & 0xFFFF) << (16 * c)
        out = out_ptr + (tl.program_id(0).to(tl.int64) * 16 + row + 8 * far)[:, None] * width + at[None, :]
        tl.store(out, joined.to(out_ptr.dtype.element_ty), mask=(at < width)[None, :])


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(tokens, out) of contiguous (tokens, in) BF16 or FP16 inputs; ``bias``: (out,), added before rounding."""
    tokens = x.shape[0]
    tiles, steps = packed.words.shape[:2]
    wide = torch.int64 if packed.num_bits == 4 else torch.int32
    taken = max(16, min(64, triton.next_power_of_2(tokens)))
    split = 2 if packed.num_bits == 4 and packed.group_size % SLAB else 1
    reach = SLAB if packed.num_bits == 4 else BLOCK
    given = tl.float16 if x.dtype == torch.float16 else tl.bfloat16
    # Triton's interpreter multiplies the bits of BF16 numbers and cuts where it should round.
    operand, kept = (given, x.dtype) if x.is_cuda else (tl.float32, torch.float32)
    y = torch.empty(tokens, packed.out_features, dtype=kept, device=x.device)
    _linear[(triton.cdiv(tiles, TILES), triton.cdiv(tokens, taken))](
        packed.words,
        packed.scale,
        x.view(wide),
        packed.scale if bias is None else bias,
        y,
        tokens,
        tiles,
        x.view(wide).shape[1],
        steps,
        packed.scale.shape[1],
        max(1, packed.group_size * split // reach),
        BITS=packed.num_bits,
        SPLIT=split,
        TOKENS=taken,
        TILES=TILES,
        HAS_BIAS=bias is not None,
        GIVEN=given,
        OPERAND=operand,
        num_warps=NUM_WARPS,
    )
    return y.to(x.dtype)


def dequantize_rows(packed: PackedLinear, out: torch.Tensor, first_row: int) -> None:
    """bf16(q s) of rows from ``first_row`` on into ``out`` (rows, in), BF16, a multiple of 16 rows."""
    wide = torch.int64 if packed.num_bits == 4 else torch.int32
    steps = packed.words.shape[1]
    _dequantize[(out.shape[0] // TILE, steps)](
        packed.words,
        packed.scale,
        out.view(wide),
        first_row // TILE,
        out.view(wide).shape[1],
        steps,
        packed.scale.shape[1],
        packed.group_size,
        BITS=packed.num_bits,
        SIZE=16 // packed.num_bits,  # inputs that stand together in a word: 8 bytes of output, or 4
        num_warps=1,
    )
