"""Where a scale starts: min-max, or the grid search that minimises a group's squared error.

Both return stored values (``round_scale``), shape (out, in / group_size), FP32.

    minmax:  s = max|w| / qmax
    mse:     s = argmin_r sum (w - fake_quantize(w; r max|w| / qmax))^2,  r in linspace(0.3, 1.2, 20)
             (GRACE eq. 14; the candidates are rounded before they are judged, so the winner is what is stored)
"""

from __future__ import annotations

from typing import Literal

import torch

from grace_vlm.quant.affine import compute_dtype, round_scale, to_groups
from grace_vlm.quant.scheme import QuantScheme

ScaleRule = Literal["minmax", "mse"]


def minmax_scale(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """max|w| / qmax of every group; an all-zero group gets the smallest stored scale."""
    scheme.check(weight.shape[0], weight.shape[1], "this weight")
    peak = to_groups(weight.to(compute_dtype(weight)), scheme.group_size).abs().amax(dim=-1)
    return round_scale(peak / scheme.qmax, scheme.scale_rounding)


def mse_scale(
    weight: torch.Tensor, scheme: QuantScheme, num_candidates: int = 20, low: float = 0.3, high: float = 1.2
) -> torch.Tensor:
    """The candidate of least squared error, group by group; ties go to the smaller ratio."""
    scheme.check(weight.shape[0], weight.shape[1], "this weight")
    groups = to_groups(weight.to(compute_dtype(weight)), scheme.group_size)
    peak = groups.abs().amax(dim=-1) / scheme.qmax
    best_scale = round_scale(peak, scheme.scale_rounding)
    best_error = torch.full_like(peak, torch.inf)
    for ratio in torch.linspace(low, high, num_candidates).tolist():
        scale = round_scale(peak * ratio, scheme.scale_rounding)
        codes = (groups / scale.unsqueeze(-1)).round().clamp(scheme.qmin, scheme.qmax)
        error = (codes * scale.unsqueeze(-1) - groups).square().sum(dim=-1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def init_scale(weight: torch.Tensor, scheme: QuantScheme, rule: ScaleRule) -> torch.Tensor:
    """``minmax_scale`` or ``mse_scale`` by name."""
    return minmax_scale(weight, scheme) if rule == "minmax" else mse_scale(weight, scheme)
