"""AWQ: before rounding, enlarge the input channels that matter, and shrink what feeds them by as much.

Lin et al. 2023, equations 4 and 5. For linears that read one input x, with m = mean abs(x) of each channel,

    s = m^alpha / sqrt(max s min s),   alpha in 0, 1/20, ..., 19/20
    argmin over alpha of sum over the linears of mean |x (W - Q(W diag s) diag 1/s)|^2 = tr(E H E^T)

where E is the error and H = mean x x^T, so no activation need be kept. Q is our rounding with the run's scale rule;
``fold.py`` then moves s into what makes x, and the layer is rounded as RTN would round it.

Deviations: the authors measure the error behind the whole attention or MLP block, we behind each linear; their second
search, for a clipping ratio, is our scale rule ``mse``. Under grouped heads they leave o_proj out, we do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grace_vlm.ptq.replay import Moments
from grace_vlm.quant.affine import fake_quantize
from grace_vlm.quant.scale_init import ScaleRule, init_scale
from grace_vlm.quant.scheme import QuantScheme

NUM_ALPHAS = 20
LEAST_MAGNITUDE = 1e-4
"""Of m^alpha, as in the authors' code: a channel that is hardly used is not shrunk without bound."""


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T): mean over tokens of the squared output error of a linear; E (out, in), H (in, in)."""
    return float(((error @ hessian) * error).sum())


def search_scale(
    weights: Sequence[torch.Tensor],
    schemes: Sequence[QuantScheme],
    moments: Moments,
    channels: torch.Tensor,
    rule: ScaleRule,
) -> tuple[torch.Tensor, float]:
    """(s (c,), alpha) of the linears that read one input.

    alpha 0 is s = 1, plain rounding by the same ``rule``: so on the calibration tokens, the linears together are never
    worse than RTN's, but for the BF16 rounding of a norm that ``fold`` adds to s.

    Args:
        weights: (out, in) each. schemes: of each. moments: of their input.
        channels: (in,) int64 in [0, c): inputs that share a scale (``channel_map``); m is their mean.
    """
    count = torch.bincount(channels).to(moments.magnitude)
    magnitude = torch.zeros_like(count).index_add_(0, channels, moments.magnitude) / count
    best, best_error = (torch.ones_like(magnitude), 0.0), float("inf")
    for number in range(NUM_ALPHAS):
        alpha = number / NUM_ALPHAS
        scale = magnitude.pow(alpha).clamp_min(LEAST_MAGNITUDE)
        scale = scale / (scale.max() * scale.min()).sqrt()
        wide = scale[channels]
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            enlarged = weight * wide
            rounded = fake_quantize(enlarged, init_scale(enlarged, scheme, rule), scheme)
            error += output_error(rounded / wide - weight, moments.hessian)
        if error < best_error:
            best, best_error = (scale, alpha), error
    return best
