"""Triton: grid weights from masters, and the straight-through backward of a whole step (quant/affine.py, quant/lsq.py).

Groups run along in_features, so a weight (out, in) is a table of (out in / g, g) rows, one scale a row. A program takes
``ROWS`` of them, of one weight; one launch does all weights of a scheme: the 196 linears of Qwen3-VL-2B by themselves
would cost the host 196 launches. Where a weight lies a program reads from a table of addresses (``GridTable``); the
scales of all weights lie end to end. Bytes a weight: forward 4 read and 2 written (FP32 master, BF16 leaf), backward 8
read and 4 written (G and master, dL/dw over G); in eager torch 44 and 106.

Bit for bit what torch computes: division and rounding are IEEE's, a NaN stays one, a code is never -0, and q s is
rounded to BF16 once. The sum over a group is made in another order, so dL/dlog s may differ in its last digits.

Codes that flipped can be counted on the way: the leaf that is overwritten holds bf16(q s) of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from grace_vlm.quant.scheme import QuantScheme

ELEMENTS, NUM_WARPS = 4096, 4
"""Weights that a program holds, and its warps."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 x 2^23: adding it leaves no fraction bits, so an FP32 number below 2^22 is rounded half to even."""
CLIP_MASKS = {"official": 0, "lsq": 1, "pass_through": 2}


@triton.jit
def _round(x):
    # A quotient of 2^22 and more is an integer already, and far outside any grid.
    return tl.where(tl.abs(x) < 4194304.0, (x + _ROUND) - _ROUND, x)


@triton.jit
def _clamp(x, low, high):
    """Into [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _place(table_ptr, weight_of_ptr, ROWS: tl.constexpr):
    """(weight, its rows that this program takes, its number of rows, its first row among all)."""
    program = tl.program_id(0)
    weight = tl.load(weight_of_ptr + program)
    entry = table_ptr + weight.to(tl.int64) * 6
    first_program, num_rows, first_row = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    row = (program - first_program) * ROWS + tl.arange(0, ROWS)
    return entry, row.to(tl.int64), num_rows, first_row


@triton.jit
def _fake_quantize(
    table_ptr,
    weight_of_ptr,
    scale_ptr,
    old_scale_ptr,
    flipped_ptr,
    qmin,
    qmax,
    LEAF: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    entry, row, num_rows, first_row = _place(table_ptr, weight_of_ptr, ROWS)
    leaf_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(LEAF)), 16)
    master_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    there = row < num_rows
    at = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scale = tl.load(scale_ptr + first_row + row, mask=there, other=1.0)[:, None]
    w = tl.load(master_ptr + at, mask=there[:, None], other=0.0)
    q = _clamp(_round(tl.div_rn(w, scale)), qmin, qmax) + 0.0
    if COUNT:
        old_scale = tl.load(old_scale_ptr + first_row + row, mask=there, other=1.0)[:, None]
        old = tl.load(leaf_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
        old_q = _clamp(_round(tl.div_rn(old, old_scale)), qmin, qmax)
        tl.store(flipped_ptr + tl.program_id(0), tl.sum(((old_q != q) & there[:, None]).to(tl.int32)))
    tl.store(leaf_ptr + at, (q * scale).to(LEAF), mask=there[:, None])


@triton.jit
def _lsq_backward(
    table_ptr,
    weight_of_ptr,
    scale_ptr,
    raw_scale_ptr,
    grad_log_scale_ptr,
    qmin,
    qmax,
    factor,
    MASK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    entry, row, num_rows, first_row = _place(table_ptr, weight_of_ptr, ROWS)
    master_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    grad_ptr = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    there = row < num_rows
    at = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scale = tl.load(scale_ptr + first_row + row, mask=there, other=1.0)[:, None]
    raw_scale = tl.load(raw_scale_ptr + first_row + row, mask=there, other=1.0)
    w = tl.load(master_ptr + at, mask=there[:, None], other=0.0)
    grad = tl.load(grad_ptr + at, mask=there[:, None], other=0.0)
    v = tl.div_rn(w, scale)
    rounded = _round(v)
    tested = rounded
    if MASK == 1:
        tested = v
    inside = (tested >= qmin) & (tested <= qmax)
    # A NaN is outside, as in torch's comparison; its code is NaN and shows in the scale's gradient.
    grad_scale = tl.sum(grad * (_clamp(rounded, qmin, qmax) - tl.where(inside, v, 0.0)), axis=1)
    tl.store(grad_log_scale_ptr + first_row + row, grad_scale * raw_scale * factor, mask=there)
    if MASK != 2:
        tl.store(grad_ptr + at, tl.where(inside, grad, 0.0), mask=there[:, None])


@dataclass(frozen=True)
class GridTable:
    """Where the weights of one scheme lie, for launches that take all of them.

    Args:
        addresses: (n, 6) int64: leaf, master, gradient; first program, groups, first group among all weights.
        weight_of: (programs,) int32, the weight that a program belongs to.
        kept: the tensors themselves, which must not be given other memory.
    """

    addresses: torch.Tensor
    weight_of: torch.Tensor
    scheme: QuantScheme
    kept: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, weights: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], scheme: QuantScheme) -> GridTable:
        """From (leaf (out, in) BF16 or FP32, master (out, in) FP32, gradient (out, in) FP32) of each weight."""
        rows = ELEMENTS // scheme.group_size
        lines: list[list[int]] = []
        weight_of: list[int] = []
        first_group = 0
        for number, (leaf, master, gradient) in enumerate(weights):
            num_groups = master.numel() // scheme.group_size
            line = [leaf.data_ptr(), master.data_ptr(), gradient.data_ptr(), len(weight_of), num_groups, first_group]
            lines.append(line)
            weight_of += [number] * triton.cdiv(num_groups, rows)
            first_group += num_groups
        device = weights[0][0].device
        addresses = torch.tensor(lines, dtype=torch.int64).to(device)
        return cls(addresses, torch.tensor(weight_of, dtype=torch.int32).to(device), scheme, tuple(weights))

    def write_leaves(self, scale: torch.Tensor, old_scale: torch.Tensor | None = None) -> torch.Tensor | None:
        """Write ``quant.affine.fake_quantize(master, scale, scheme)`` into every leaf (FP32 leaves: not rounded).

        Args:
            scale: (groups of all weights,) FP32, the stored scales.
            old_scale: likewise, what the leaves were written with: count the codes that differ.

        Returns:
            How many codes differ, a scalar tensor; None if they were not counted.
        """
        counts, leaf = old_scale is not None, self.kept[0][0]
        flipped = torch.empty(len(self.weight_of) if counts else 0, dtype=torch.int32, device=scale.device)
        _fake_quantize[(len(self.weight_of),)](
            self.addresses,
            self.weight_of,
            scale,
            scale if old_scale is None else old_scale,
            flipped,
            float(self.scheme.qmin),
            float(self.scheme.qmax),
            LEAF=tl.bfloat16 if leaf.dtype == torch.bfloat16 else tl.float32,
            COUNT=counts,
            GROUP=self.scheme.group_size,
            ROWS=ELEMENTS // self.scheme.group_size,
            num_warps=NUM_WARPS,
        )
        return flipped.sum() if counts else None

    def backward(
        self,
        scale: torch.Tensor,
        raw_scale: torch.Tensor,
        grad_log_scale: torch.Tensor,
        clip_mask: str = "official",
        scale_gradient: str = "none",
    ) -> None:
        """``quant.lsq.lsq_backward`` of every weight: dL/dw over its gradient, dL/dlog_scale into ``grad_log_scale``.

        Args:
            scale, raw_scale, grad_log_scale: (groups of all weights,) FP32: stored, sign * exp(log_scale), and output.
        """
        factor = (self.scheme.group_size * self.scheme.qmax) ** -0.5 if scale_gradient == "lsq" else 1.0
        _lsq_backward[(len(self.weight_of),)](
            self.addresses,
            self.weight_of,
            scale,
            raw_scale,
            grad_log_scale,
            float(self.scheme.qmin),
            float(self.scheme.qmax),
            factor,
            MASK=CLIP_MASKS[clip_mask],
            GROUP=self.scheme.group_size,
            ROWS=ELEMENTS // self.scheme.group_size,
            num_warps=NUM_WARPS,
        )
