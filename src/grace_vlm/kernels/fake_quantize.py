"""Triton: grid weights from masters, and the straight-through backward of a whole step (quant/affine.py, quant/lsq.py).

Groups run along in_features, so a weight (out, in) is a table of (out in / g, g) rows, one scale a row. A program takes
``ROWS`` of them. Bytes a weight: forward 4 read and 2 written (FP32 master, BF16 leaf), backward 8 read and 4 written
(G and master, dL/dw over G); in eager torch 44 and 106.

Bit for bit what torch computes: division and rounding are IEEE's, a NaN stays one, zeros are +0.0, and q s is rounded
to BF16 once. The sum over a group is made in another order, so dL/dlog s may differ in its last digits.

Codes that flipped can be counted on the way: the leaf that is overwritten holds bf16(q s) of the step before.
"""

from __future__ import annotations

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
def _fake_quantize(
    master_ptr,
    scale_ptr,
    leaf_ptr,
    old_scale_ptr,
    flipped_ptr,
    num_groups,
    qmin,
    qmax,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_groups
    at = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scale = tl.load(scale_ptr + row, mask=there, other=1.0)[:, None]
    w = tl.load(master_ptr + at, mask=there[:, None], other=0.0)
    q = _clamp(_round(tl.div_rn(w, scale)), qmin, qmax) + 0.0
    if COUNT:
        old_scale = tl.load(old_scale_ptr + row, mask=there, other=1.0)[:, None]
        old = tl.load(leaf_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
        old_q = _clamp(_round(tl.div_rn(old, old_scale)), qmin, qmax)
        tl.store(flipped_ptr + tl.program_id(0), tl.sum(((old_q != q) & there[:, None]).to(tl.int32)))
    tl.store(leaf_ptr + at, (q * scale).to(leaf_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def _lsq_backward(
    grad_ptr,
    master_ptr,
    scale_ptr,
    raw_scale_ptr,
    grad_log_scale_ptr,
    num_groups,
    qmin,
    qmax,
    factor,
    MASK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_groups
    at = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scale = tl.load(scale_ptr + row, mask=there, other=1.0)[:, None]
    raw_scale = tl.load(raw_scale_ptr + row, mask=there, other=1.0)
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
    tl.store(grad_log_scale_ptr + row, grad_scale * raw_scale * factor, mask=there)
    if MASK != 2:
        tl.store(grad_ptr + at, tl.where(inside, grad, 0.0), mask=there[:, None])


def fake_quantize_into(
    leaf: torch.Tensor,
    master: torch.Tensor,
    scale: torch.Tensor,
    scheme: QuantScheme,
    old_scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Write ``quant.affine.fake_quantize(master, scale, scheme)`` into ``leaf``.

    Args:
        leaf: (out, in) BF16; FP32 gets the product unrounded. master: (out, in) FP32.
        scale: (out, in / group_size) FP32, the stored scale.
        old_scale: likewise, what ``leaf`` was written with: count the codes that differ.

    Returns:
        How many codes differ, a scalar tensor; None if they were not counted.
    """
    num_groups, rows = scale.numel(), ELEMENTS // scheme.group_size
    num_programs = triton.cdiv(num_groups, rows)
    counts = old_scale is not None
    flipped = torch.empty(num_programs if counts else 0, dtype=torch.int32, device=leaf.device)
    _fake_quantize[(num_programs,)](
        master,
        scale,
        leaf,
        scale if old_scale is None else old_scale,
        flipped,
        num_groups,
        float(scheme.qmin),
        float(scheme.qmax),
        COUNT=counts,
        GROUP=scheme.group_size,
        ROWS=rows,
        num_warps=NUM_WARPS,
    )
    return flipped.sum() if counts else None


def lsq_backward_in_place(
    grad: torch.Tensor,
    master: torch.Tensor,
    scale: torch.Tensor,
    raw_scale: torch.Tensor,
    scheme: QuantScheme,
    clip_mask: str = "official",
    scale_gradient: str = "none",
) -> torch.Tensor:
    """``quant.lsq.lsq_backward`` with dL/dw written over ``grad``; returns dL/dlog_scale (out, in / group_size) FP32.

    Args:
        grad: (out, in) FP32, dL/dw^ of the step. master: (out, in) FP32, as it was when the leaf was written.
        scale, raw_scale: (out, in / group_size) FP32: stored, and exp(log_scale).
    """
    grad_log_scale = torch.empty_like(scale)
    num_groups, rows = scale.numel(), ELEMENTS // scheme.group_size
    factor = (scheme.group_size * scheme.qmax) ** -0.5 if scale_gradient == "lsq" else 1.0
    _lsq_backward[(triton.cdiv(num_groups, rows),)](
        grad,
        master,
        scale,
        raw_scale,
        grad_log_scale,
        num_groups,
        float(scheme.qmin),
        float(scheme.qmax),
        factor,
        MASK=CLIP_MASKS[clip_mask],
        GROUP=scheme.group_size,
        ROWS=rows,
        num_warps=NUM_WARPS,
    )
    return grad_log_scale
