"""Where a scale starts: min-max, or the grid search that minimises a group's squared error, with or without a sign.

All return stored values (``round_scale``), shape (out, in / group_size), FP32.

    minmax:  s = max|w| / qmax
    mse:     s = argmin_r sum (w - fake_quantize(w; r max|w| / qmax))^2,  r in linspace(0.3, 1.2, 20)
             (GRACE eq. 14; the candidates are rounded before they are judged, so the winner is what is stored)
    mse_signed: mse, or mse of -w with its scale negated, whichever errs less

The grid has one more code below zero than above. A negative scale turns it around, so that the extra code is at the
longer tail of the group, for nothing: a layout stores the scale with its sign. (llama.cpp's Q4_0 does so with min-max.)
"""

from __future__ import annotations

from typing import Literal

import torch

from grace_vlm.quant.affine import compute_dtype, round_scale, to_groups
from grace_vlm.quant.scheme import QuantScheme

ScaleRule = Literal["minmax", "mse", "mse_signed"]


def minmax_scale(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """max|w| / qmax of every group; an all-zero group gets the smallest stored scale."""
    scheme.check(weight.shape[0], weight.shape[1], "this weight")
    peak = to_groups(weight.to(compute_dtype(weight)), scheme.group_size).abs().amax(dim=-1)
    return round_scale(peak / scheme.qmax, scheme.scale_rounding)


def mse_scale(
    weight: torch.Tensor, scheme: QuantScheme, num_candidates: int = 20, low: float = 0.3, high: float = 1.2
) -> torch.Tensor:
    """The candidate of least squared error, group by group; ties go to the smaller ratio."""
    return _search(weight, scheme, num_candidates, low, high)[0]


def signed_scale(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """``mse_scale`` with the sign of least squared error; ties go to the positive scale."""
    (above, error), (below, other) = _search(weight, scheme), _search(-weight, scheme)
    return torch.where(other < error, -below, above)


def _search(
    weight: torch.Tensor, scheme: QuantScheme, num_candidates: int = 20, low: float = 0.3, high: float = 1.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stored scale, its squared error) of every group, (out, groups) each."""
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
    return best_scale, best_error


def init_scale(weight: torch.Tensor, scheme: QuantScheme, rule: ScaleRule) -> torch.Tensor:
    """(out, groups) stored scales by the name of a rule."""
    return {"minmax": minmax_scale, "mse": mse_scale, "mse_signed": signed_scale}[rule](weight, scheme)
