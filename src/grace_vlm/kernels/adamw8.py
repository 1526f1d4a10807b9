"""Triton: AdamW with byte moments for all tensors of a run in one launch (train/adamw8.py).

A program takes ``ROWS`` blocks of 256 elements of one tensor and finds where they lie in a table of addresses. Bytes an
element: 10 read (master, gradient, two codes) and 6 written, and 8 a block each way for the scales. FP32 moments would
be 16 and 12.

Bit for bit what torch computes: division and square root are IEEE's, no product is fused with a sum, and what is random
there is a function of index and step. Offsets are 64-bit: a vocabulary's head alone has 622 million elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK, ROWS, NUM_WARPS = 256, 2, 4
"""Elements that share a scale, blocks that a program takes, and its warps: four elements a thread. With more, Triton
loads 16 bytes of codes and of FP32 numbers to different threads, and brings them together through shared memory."""
_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
_ONE_BITS = tl.constexpr(0x3F800000)
_SMALLEST = tl.constexpr(2.0**-126)
_RANDOM_OVER_LOWEST = tl.constexpr(2.0**36 / 1.25)
Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, float]
"""(master, gradient, codes of m, codes of v, scales (2, blocks), peak rate, weight decay) of one tensor."""


@triton.jit
def _decode(code, scale, LEVELS: tl.constexpr):
    bits = _ONE_BITS - ((LEVELS - code) << 20)
    return tl.where(code > 0, bits.to(tl.float32, bitcast=True), 0.0) * scale[:, None]


@triton.jit
def _encode(x, threshold, LEVELS: tl.constexpr, KEEP: tl.constexpr):
    scale = tl.max(x, axis=1)
    # One division a block. Below the smallest normal number its inverse would be infinite.
    ratio = x * tl.where(scale >= _SMALLEST, tl.div_rn(1.0, scale), 0.0)[:, None]
    above = ratio.to(tl.int32, bitcast=True) - (_ONE_BITS - ((LEVELS - 1) << 20))
    if KEEP:
        low = (x > 0).to(tl.int32)
    else:
        low = (ratio * _RANDOM_OVER_LOWEST > threshold.to(tl.float32)).to(tl.int32)
    code = tl.where(above < 0, low, 1 + ((above + threshold) >> 20))
    return tl.minimum(code, LEVELS), scale


@triton.jit(do_not_specialize=["turn"])
def _adamw8(
    table_ptr,
    rates_ptr,
    tensor_of_ptr,
    skip_ptr,
    turn,
    keep1,
    take1,
    keep2,
    take2,
    epsilon,
    inverse_root_c2,
    rate_factor,
    rate_factor_c1,
):
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_ptr + program).to(tl.int64)
    entry = table_ptr + tensor * 8
    master_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float32)), 16)
    grad_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    m_ptr = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.uint8)), 16)
    v_ptr = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.uint8)), 16)
    scale_ptr = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    num_elements, first_program, first_block = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
    num_blocks = (num_elements + (_BLOCK - 1)) // _BLOCK
    size = tl.load(rates_ptr + tensor * 2) * rate_factor_c1
    shrink = tl.load(rates_ptr + tensor * 2 + 1) * rate_factor

    block = (program - first_program) * _ROWS + tl.arange(0, _ROWS).to(tl.int64)
    lane = tl.arange(0, _BLOCK)[None, :]
    at = block[:, None] * _BLOCK + lane
    # A step that is skipped has no elements: it reads and writes nothing.
    is_skipped = tl.load(skip_ptr) == 1.0
    has_scale = block < tl.where(is_skipped, 0, num_blocks)
    there = at < tl.where(is_skipped, 0, num_elements)

    w = tl.load(master_ptr + at, mask=there, other=0.0)
    g = tl.load(grad_ptr + at, mask=there, other=0.0)
    m_code = tl.load(m_ptr + at, mask=there, other=0).to(tl.int32)
    v_code = tl.load(v_ptr + at, mask=there, other=0).to(tl.int32)
    m_scale = tl.load(scale_ptr + block, mask=has_scale, other=0.0)
    v_scale = tl.load(scale_ptr + num_blocks + block, mask=has_scale, other=0.0)

    sign = tl.where(m_code >= 128, -1.0, 1.0)
    m = _decode(m_code & 127, m_scale, 127) * sign * keep1 + g * take1
    v = _decode(v_code, v_scale, 255) * keep2 + g * g * take2
    update = tl.div_rn(m, tl.sqrt_rn(v) * inverse_root_c2 + epsilon)
    tl.store(master_ptr + at, w - (w * shrink + update * size), mask=there)

    start = ((first_block + block)[:, None] * _BLOCK + lane).to(tl.uint32) + turn.to(tl.uint32)
    start = (start ^ (start >> 16)) * 0x85EBCA6B
    start = (start ^ (start >> 13)) * 0xC2B2AE35
    start = start ^ (start >> 16)
    for_m = (((start << 16) | (start >> 16)) >> 12).to(tl.int32)
    for_v = (start >> 12).to(tl.int32)
    m_code, m_scale = _encode(tl.abs(m), for_m, 127, False)
    v_code, v_scale = _encode(v, for_v, 255, True)
    tl.store(m_ptr + at, (m_code + tl.where(m < 0, 128, 0)).to(tl.uint8), mask=there)
    tl.store(v_ptr + at, v_code.to(tl.uint8), mask=there)
    tl.store(scale_ptr + block, m_scale, mask=has_scale)
    tl.store(scale_ptr + num_blocks + block, v_scale, mask=has_scale)


@dataclass(frozen=True)
class MomentTable:
    """Where masters, gradients and moments lie, for launches that take all of them.

    Args:
        addresses: (n, 8) int64: master, gradient, codes of m and v, scales; elements, first program, first block.
        rates: (n, 2) FP32: peak rate, and that times the weight decay.
        tensor_of: (programs,) int32, the tensor that a program belongs to.
        zero: FP32 scalar, the ``skip`` of a step that is not to be skipped.
        kept: the tensors themselves, which must not be given other memory.
    """

    addresses: torch.Tensor
    rates: torch.Tensor
    tensor_of: torch.Tensor
    zero: torch.Tensor
    kept: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> MomentTable:
        """From rows whose tensors are contiguous and begin at multiples of 16 bytes."""
        lines: list[list[int]] = []
        programs: list[torch.Tensor] = []
        first_program = first_block = 0
        for number, (*tensors, _, _) in enumerate(rows):
            num_elements = tensors[0].numel()
            assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)
            lines.append([*(x.data_ptr() for x in tensors), num_elements, first_program, first_block])
            num_programs = triton.cdiv(num_elements, BLOCK * ROWS)
            programs.append(torch.full((num_programs,), number, dtype=torch.int32))
            first_program += num_programs
            first_block += triton.cdiv(num_elements, BLOCK)
        device = rows[0][0].device
        rates = torch.tensor([[rate, rate * decay] for *_, rate, decay in rows], dtype=torch.float32)
        return cls(
            torch.tensor(lines, dtype=torch.int64).to(device),
            rates.to(device),
            torch.cat(programs).to(device),
            torch.zeros((), dtype=torch.float32, device=device),
            tuple(rows),
        )

    def step(
        self,
        beta1: float,
        beta2: float,
        epsilon: float,
        inverse_root_c2: float,
        rate_factor: float,
        rate_factor_c1: float,
        turn: int,
        skip: torch.Tensor | None = None,
    ) -> None:
        """``train.adamw8.adamw8_`` of every tensor; the numbers are those of its ``Rule``.

        Args:
            skip: FP32 scalar on the device; 1 leaves every byte as it was.
        """
        _adamw8[(len(self.tensor_of),)](
            self.addresses,
            self.rates,
            self.tensor_of,
            self.zero if skip is None else skip,
            # As a signed number: one above 2^31 would be another type, and another kernel.
            turn - (1 << 32) if turn >= 1 << 31 else turn,
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            epsilon,
            inverse_root_c2,
            rate_factor,
            rate_factor_c1,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
