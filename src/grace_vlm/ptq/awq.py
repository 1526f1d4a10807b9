"""AWQ: before rounding, enlarge the input channels that matter, and shrink what feeds them by as much.

Lin et al. 2023, equations 4 and 5. For linears that read one input x, with m = mean abs(x) of each channel,

    s = m^alpha / sqrt(max s min s),   alpha in 0, 1/20, ..., 19/20
    argmin over alpha of sum over the linears of mean |x (W - Q(W diag s) diag 1/s)|^2 = tr(E H E^T)

where E is the error and H = mean x x^T, so no activation need be kept. Q takes min-max scales. Then W diag s is rounded
with scales by min-max, or (``mse``) with the clip search of the paper: of 20 ratios of min-max in (0.5, 1], the one of
least output error, group by group, e H_gg e^T.

1/s goes into what makes x (a norm's weight; the rows and bias of v_proj or up_proj). A norm's weight is BF16 in the
published model: it is rounded first, and s is then what that rounding left, so the pair is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.ptq.replay import Moments
from grace_vlm.quant.affine import fake_quantize, round_scale, to_groups
from grace_vlm.quant.scale_init import ScaleRule, minmax_scale
from grace_vlm.quant.scheme import QuantScheme

NUM_ALPHAS = 20
NUM_CLIPS = 20


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T): mean over tokens of the squared output error of a linear; E (out, in), H (in, in)."""
    return float(((error @ hessian) * error).sum())


def search_scale(
    weights: Sequence[torch.Tensor], schemes: Sequence[QuantScheme], moments: Moments
) -> tuple[torch.Tensor, float]:
    """(s (in,) FP32, alpha) of the linears that read one input; alpha 0 is s = 1, so never worse than rounding.

    Args:
        weights: (out, in) FP32 each. schemes: of each. moments: of their input.
    """
    magnitude = moments.magnitude.clamp_min(1e-8)
    best = (torch.ones_like(magnitude), 0.0)
    best_error = float("inf")
    for number in range(NUM_ALPHAS):
        alpha = number / NUM_ALPHAS
        scale = magnitude.pow(alpha).clamp_min(1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            wide = weight * scale
            rounded = fake_quantize(wide, minmax_scale(wide, scheme), scheme)
            error += output_error(rounded / scale - weight, moments.hessian)
        if error < best_error:
            best, best_error = (scale, alpha), error
    return best


def awq_scale(weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, rule: ScaleRule) -> torch.Tensor:
    """Stored scales (out, in / group_size) of a weight that is already enlarged; ``hessian`` of its own input."""
    peak = minmax_scale(weight, scheme)
    if rule == "minmax":
        return peak
    size = scheme.group_size
    groups = to_groups(weight, size)
    blocks = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)])
    best, best_error = peak, torch.full_like(peak, torch.inf)
    for number in range(NUM_CLIPS):
        scale = round_scale(peak * (1 - number / (2 * NUM_CLIPS)), scheme.scale_rounding)
        codes = (groups / scale.unsqueeze(-1)).round().clamp(scheme.qmin, scheme.qmax)
        off = codes * scale.unsqueeze(-1) - groups
        error = (torch.einsum("ogi,gij->ogj", off, blocks) * off).sum(dim=-1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


@torch.no_grad()
def shrink_norm(norm: Any, scale: torch.Tensor) -> torch.Tensor:
    """Divide a norm's output by ``scale`` (d,) through its BF16 weight; returns the scale that the rounding left.

    A norm that multiplies by 1 + weight is told from one that multiplies by weight by trying.

    Raises:
        ConfigError: it does neither.
    """
    # Taken apart by what it does to ones at weight 0: nothing is left of a plain norm.
    before = norm.weight.detach().clone()
    probe = torch.linspace(-1, 1, len(before), device=before.device, dtype=before.dtype)
    norm.weight.zero_()
    at_zero = norm(probe)
    norm.weight.fill_(1.0)
    at_one = norm(probe)
    norm.weight.copy_(before)
    if bool((at_zero == 0).all()):
        offset = 0.0
    elif torch.allclose(2 * at_zero, at_one, rtol=1e-2):
        offset = 1.0
    else:
        raise ConfigError(f"awq cannot fold into a {type(norm).__name__}; use --method gptq")
    gain = before.double() + offset
    norm.weight.copy_((gain / scale.double() - offset).to(torch.bfloat16))
    left = gain / (norm.weight.double() + offset)
    return torch.where(torch.isfinite(left) & (left > 0), left, 1.0).to(scale.dtype)
