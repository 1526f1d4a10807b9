"""AWQ's searches: never worse than rounding with min-max scales, better where channels differ."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.ptq.awq import NUM_ALPHAS, clipped_scale, output_error, search_scale
from grace_vlm.ptq.replay import Moments
from grace_vlm.quant import QuantScheme, fake_quantize, init_scale, minmax_scale


def inputs(size: int, seed: int, loudness: float) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, size, generator=generator) * (loudness * torch.randn(size, generator=generator)).exp()
    return Moments(x.T @ x / len(x), x.abs().mean(dim=0))


def error_of(weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme, moments: Moments) -> float:
    wide = weight * scale
    rounded = fake_quantize(wide, minmax_scale(wide, scheme), scheme) / scale
    return output_error(rounded - weight, moments.hessian)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_errs_no_more_than_rounding(bits: int) -> None:
    scheme, channels = QuantScheme(bits, 64), torch.arange(128)
    for seed, loudness in enumerate((0.0, 0.5, 1.5)):
        moments = inputs(128, seed, loudness)
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(out, 128, generator=generator) for out in (32, 16)]
        scale, alpha = search_scale(weights, [scheme] * 2, moments, channels)
        ours = sum(error_of(weight, scale, scheme, moments) for weight in weights)
        rtn = sum(error_of(weight, torch.ones(128), scheme, moments) for weight in weights)
        assert ours <= rtn
        if loudness > 1:
            assert alpha > 0
            assert ours < 0.8 * rtn


def test_is_the_best_of_the_paper_s_grid() -> None:
    moments, scheme = inputs(128, 0, 1.0), QuantScheme(3, 64)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(5))
    scale, alpha = search_scale([weight], [scheme], moments, torch.arange(128))
    errors = {}
    for number in range(NUM_ALPHAS):
        power = moments.magnitude ** (number / NUM_ALPHAS)
        scale_then = power / (power.max() * power.min()).sqrt()
        errors[number / NUM_ALPHAS] = error_of(weight, scale_then, scheme, moments)
    assert alpha == min(errors, key=lambda key: errors[key])
    power = moments.magnitude**alpha
    assert torch.allclose(scale, power / (power.max() * power.min()).sqrt())


def test_inputs_that_share_a_channel_share_its_mean_magnitude() -> None:
    moments, scheme = inputs(128, 0, 1.0), QuantScheme(3, 64)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(5))
    channels = torch.arange(64).repeat(2)
    scale, alpha = search_scale([weight], [scheme], moments, channels)
    power = moments.magnitude.reshape(2, 64).mean(dim=0) ** alpha
    assert scale.shape == (64,)
    assert torch.allclose(scale, power / (power.max() * power.min()).sqrt())


def test_inputs_without_any_value() -> None:
    """All magnitudes 0: every alpha errs by nothing, and the scale is 1."""
    moments = Moments(torch.zeros(64, 64), torch.zeros(64))
    scale, alpha = search_scale([torch.randn(8, 64)], [QuantScheme(4, 64)], moments, torch.arange(64))
    assert alpha == 0
    assert torch.equal(scale, torch.ones(64))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_clipped_group_errs_no_more_than_min_max_or_the_least_error_of_weights(bits: int) -> None:
    """By its own inputs, a group at a time; a scale that looks at the weights alone errs more where inputs differ."""
    moments, scheme = inputs(128, 1, 1.0), QuantScheme(bits, 64)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(5))

    def losses(scale: torch.Tensor) -> torch.Tensor:
        error = (fake_quantize(weight, scale, scheme, value_dtype=None) - weight).reshape(32, 2, 64)
        blocks = torch.stack([moments.hessian[:64, :64], moments.hessian[64:, 64:]])
        return (torch.einsum("ogi,gij->ogj", error, blocks) * error).sum(dim=-1)

    scale = clipped_scale(weight, moments.hessian, scheme)
    peak = minmax_scale(weight, scheme)
    assert bool((losses(scale) <= losses(peak)).all())
    assert losses(scale).sum() < losses(init_scale(weight, scheme, "mse")).sum()
    assert bool(((scale >= 0.29 * peak) & (scale <= 1.21 * peak)).all())
    assert torch.equal(scale, scale.to(torch.bfloat16).float())
