"""The trained grids of one scheme: log-scales end to end in one buffer, so that each operation is one for all weights.

    sign exp(log_scale) = raw_scale --round_scale--> scale  (groups of all weights,): few launches instead of 600
    leaves  <- bf16(q s) of (master, scale)
    dL/dmaster (over the summed gradient), dL/dlog_scale

On a GPU leaves and backward are one Triton launch each (kernels/fake_quantize.py), else weight by weight in torch
(quant/affine.py, quant/lsq.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grace_vlm.kernels import runs_triton
from grace_vlm.quant.affine import fake_quantize, quantize, quantize_tensor, round_scale
from grace_vlm.quant.lsq import ClipMask, ScaleGradient, lsq_backward, scale_of
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme


@dataclass(frozen=True)
class GridWeight:
    """One weight: ``leaf`` what the forward uses, ``master`` what is trained, ``gradient`` the sum of dL/dleaf; all
    (out, in). ``start``: (out, in / group_size) scale that it begins with."""

    name: str
    leaf: torch.Tensor
    master: torch.Tensor
    gradient: torch.Tensor
    start: torch.Tensor


class Grids:
    """Scales of the weights of one scheme, and what is done with them once a step.

    Args:
        is_signed: whether scales may be negative, in whatever process.

    Attributes:
        log_scales: name -> (out, in / group_size) parameter, a view of the one buffer.
        signs: name -> +1 and -1 of each scale, likewise; empty where all are positive.
    """

    def __init__(self, scheme: QuantScheme, weights: Sequence[GridWeight], is_signed: bool = False) -> None:
        self.scheme, self.weights = scheme, tuple(weights)
        flat = torch.cat([w.start.to(torch.float64).abs().log().to(w.master.dtype).flatten() for w in weights])
        self._signs = torch.cat([w.start.flatten() for w in weights]).sign().to(flat) if is_signed else None
        self._log_scale, self._gradient, self._first = flat, torch.zeros_like(flat), flat.clone()
        self._raw_scale = self._scale = torch.empty_like(flat)
        self._shapes = [w.start.shape for w in weights]
        self.log_scales = {w.name: nn.Parameter(part) for w, part in zip(weights, self._parts(flat), strict=True)}
        self.signs = (
            dict(zip(self.log_scales, self._parts(self._signs), strict=True)) if self._signs is not None else {}
        )
        self._table = self._make_table()

    def _parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a buffer, one a weight."""
        sizes = [shape.numel() for shape in self._shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self._shapes, strict=True)]

    def _make_table(self) -> Any:
        """The kernels' table; None where they cannot take these weights."""
        size = self.scheme.group_size
        tensors = [tensor for w in self.weights for tensor in (w.leaf, w.master, w.gradient)]
        dtypes = {(w.leaf.dtype, w.master.dtype) for w in self.weights}
        if (
            dtypes != {(torch.bfloat16, torch.float32)}
            or size & (size - 1)
            or not all(tensor.is_contiguous() for tensor in tensors)
            or not runs_triton(*tensors)
        ):
            return None
        from grace_vlm.kernels.fake_quantize import ELEMENTS, GridTable

        if size > ELEMENTS:
            return None
        return GridTable.of([(w.leaf, w.master, w.gradient) for w in self.weights], self.scheme)

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(sign exp(log_scale), what is stored of it), flat."""
        raw = scale_of(self._log_scale, self._signs)
        return raw, round_scale(raw, self.scheme.scale_rounding)

    def scales_in_use(self) -> list[tuple[GridWeight, torch.Tensor]]:
        """(weight, (out, in / group_size) scale as stored) of every weight, as its leaf was written last."""
        return list(zip(self.weights, self._parts(self._scale), strict=True))

    def drift(self) -> torch.Tensor:
        """(sum of |log s - log s_0|, groups), FP64 on the device; s_0 is what the scales began with."""
        moved = (self._log_scale - self._first).abs().double().sum()
        return torch.stack([moved, torch.full_like(moved, self._first.numel())])

    def are_finite(self) -> torch.Tensor:
        """Whether every log-scale is a number, a bool scalar: one of -inf makes a group of zeros and no NaN."""
        return self._log_scale.isfinite().all()

    @torch.no_grad()
    def write_leaves(self, count_flips: bool) -> torch.Tensor | None:
        """Every leaf from its master and log-scale; how many codes flipped, a scalar tensor, if they are counted."""
        old_scale = self._scale
        self._raw_scale, self._scale = self._scales()
        if self._table is not None:
            found: torch.Tensor | None = self._table.write_leaves(self._scale, old_scale if count_flips else None)
            return found
        flipped = torch.zeros((), dtype=torch.int64, device=old_scale.device)
        for w, old, scale in zip(self.weights, self._parts(old_scale), self._parts(self._scale), strict=True):
            if count_flips:
                before = quantize(w.leaf.to(w.master.dtype), old, self.scheme)
                flipped += (before != quantize(w.master, scale, self.scheme)).sum()
            w.leaf.copy_(fake_quantize(w.master, scale, self.scheme))
        return flipped if count_flips else None

    @torch.no_grad()
    def backward(self, clip_mask: ClipMask, scale_gradient: ScaleGradient) -> None:
        """dL/dmaster over every ``gradient``, and ``.grad`` of every log-scale."""
        if self._table is not None:
            self._table.backward(self._scale, self._raw_scale, self._gradient, clip_mask, scale_gradient)
        for w, grad_log_scale in zip(self.weights, self._parts(self._gradient), strict=True):
            log_scale, sign = self.log_scales[w.name], self.signs.get(w.name)
            if self._table is None:
                grad, found = lsq_backward(
                    w.gradient, w.master, log_scale, self.scheme, clip_mask, scale_gradient, sign
                )
                w.gradient.copy_(grad)
                grad_log_scale.copy_(found)
            log_scale.grad = grad_log_scale

    @torch.no_grad()
    def quantized(self) -> dict[str, QuantizedTensor]:
        """name -> (codes, stored scale) of the masters and log-scales as they are now."""
        scales = self._parts(self._scales()[1])
        return {
            w.name: quantize_tensor(w.master, scale, self.scheme) for w, scale in zip(self.weights, scales, strict=True)
        }
