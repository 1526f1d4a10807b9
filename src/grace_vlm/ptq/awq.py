"""AWQ: before rounding, enlarge the input channels that matter, and shrink what feeds them by as much.

Lin et al. 2023, equations 4 and 5. For linears that read one input x, with m = mean abs(x) of each channel,

    s = m^alpha / sqrt(max s min s),   alpha in 0, 1/20, ..., 19/20
    argmin over alpha of sum over the linears of mean |x (W - Q(W diag s) diag 1/s)|^2 = tr(E H E^T)

where E is the error, Q rounds with min-max scales and H = mean x x^T, so no activation need be kept. ``fold.py`` then
moves s into what makes x. Rounding scales come after that: by min-max, or under ``mse`` by the authors' second search,
the share of min-max with the least output error, group by group; under ``mse_signed`` of both signs. (The least error
of the weights, which ``mse`` means for RTN, clips the very channels that were enlarged: docs/log.md.)

Deviations: the authors measure the error behind the whole attention or MLP block, we behind each linear, and behind
each group in the second search. Under grouped heads they leave o_proj out, we do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grace_vlm.ptq.replay import Moments
from grace_vlm.quant.affine import fake_quantize, round_scale, to_groups
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantScheme

NUM_ALPHAS = 20
NUM_CLIPS = 20
CLIP_RANGE = (0.3, 1.2)
"""Shares of min-max that are tried, those of ``mse_scale``: at 2 bits the authors' (0.5, 1] would not reach down."""
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
) -> tuple[torch.Tensor, float]:
    """(s (c,), alpha) of the linears that read one input.

    alpha 0 is s = 1, plain rounding: so on the calibration tokens, the linears together are never worse than RTN's
    with min-max scales, but for the BF16 rounding of a norm that ``fold`` adds to s.

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
            rounded = fake_quantize(enlarged, minmax_scale(enlarged, scheme), scheme)
            error += output_error(rounded / wide - weight, moments.hessian)
        if error < best_error:
            best, best_error = (scale, alpha), error
    return best


def clipped_scale(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, is_signed: bool = False
) -> torch.Tensor:
    """Stored scales (out, in / group_size): the share of min-max with the least e H_gg e^T, group by group.

    Args:
        weight: (out, in). hessian: (in, in), mean of x x^T of this weight's own input; H_gg is its block of a group.
        is_signed: try every share below zero too.
    """
    size = scheme.group_size
    groups = to_groups(weight, size)
    blocks = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)])
    peak = minmax_scale(weight, scheme)
    best, best_error = peak, torch.full_like(peak, torch.inf)
    shares = (1.0, *torch.linspace(*CLIP_RANGE, NUM_CLIPS).tolist())
    for ratio in (*shares, *(-share for share in shares if is_signed)):
        scale = round_scale(peak * ratio, scheme.scale_rounding)
        codes = (groups / scale.unsqueeze(-1)).round().clamp(scheme.qmin, scheme.qmax)
        error = codes * scale.unsqueeze(-1) - groups
        loss = (torch.einsum("ogi,gij->ogj", error, blocks) * error).sum(dim=-1)
        better = loss < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, loss, best_error)
    return best
