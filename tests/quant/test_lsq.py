"""The straight-through backward against torch's own autograd over round, clamp and exp."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.quant.affine import fake_quantize, round_scale
from grace_vlm.quant.lsq import LsqFakeQuantize, lsq_backward
from grace_vlm.quant.scheme import QuantScheme

BITS = (8, 4, 3, 2)


class Round(torch.autograd.Function):
    """Rounding whose gradient is 1. (The trick v + (round(v) - v).detach() misses the integer by an ulp, and the
    clamp after it then takes 7.000000000000001 for outside.)"""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Clamp whose gradient is 1 on the bounds themselves, as torch.clamp's was in the official environment (2.5).

    torch 2.14 gives 0 there, which would take every code 7 and -8 for clipped.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))


class PlainClamp(torch.autograd.Function):
    """Clamp whose gradient is 1 for a weight outside, 0 for nothing: what pass_through asks of the weight alone."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def stored(scale: torch.Tensor, rounding: str) -> torch.Tensor:
    """The stored scale, written apart."""
    limited = torch.minimum(torch.maximum(scale, torch.tensor(2.0**-14, dtype=scale.dtype)), torch.tensor(2.0**15))
    limited = limited.to(scale.dtype)
    if rounding == "bf16":
        return limited.bfloat16().to(scale.dtype)
    if rounding == "sig5":
        unit = 2.0 ** (torch.floor(torch.log2(limited)) - 4)
        return torch.round(limited / unit) * unit
    return limited


def straight_through(
    weight: torch.Tensor,
    log_scale: torch.Tensor,
    scheme: QuantScheme,
    clip_mask: str,
    sign: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """q * s built from torch operations; autograd supplies every gradient."""
    low, high = -(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1
    raw = log_scale.exp()
    scale = (sign * (raw + (stored(raw, scheme.scale_rounding) - raw).detach())).unsqueeze(-1)
    v = weight.reshape(weight.shape[0], -1, scheme.group_size) / scale
    if clip_mask == "official":
        codes = clamp(Round.apply(v), low, high)
    else:
        codes = Round.apply(clamp(v, low, high))
    return (codes * scale).reshape(weight.shape)


def problem(
    bits: int, rounding: str = "bf16", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, QuantScheme]:
    """(G, w, log s, scheme): scales small enough that a good share of the weights is clipped."""
    generator = torch.Generator().manual_seed(seed)
    scheme = QuantScheme(bits, 16, rounding)  # type: ignore[arg-type]
    weight = torch.randn(5, 48, generator=generator, dtype=torch.float64)
    peak = weight.reshape(5, 3, 16).abs().amax(-1)
    factor = 0.4 + 0.5 * torch.rand(5, 3, generator=generator, dtype=torch.float64)
    log_scale = (peak / scheme.qmax * factor).log()
    grad = torch.randn(5, 48, generator=generator, dtype=torch.float64)
    return grad, weight, log_scale, scheme


def assert_near(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ["bf16", "sig5", "fp32"])
@pytest.mark.parametrize("clip_mask", ["official", "lsq"])
def test_gradients_equal_autograd(bits: int, rounding: str, clip_mask: str) -> None:
    for seed in range(5):
        grad, weight, log_scale, scheme = problem(bits, rounding, seed)
        w, theta = weight.clone().requires_grad_(), log_scale.clone().requires_grad_()
        (straight_through(w, theta, scheme, clip_mask) * grad).sum().backward()
        ours = lsq_backward(grad, weight, log_scale, scheme, clip_mask)  # type: ignore[arg-type]
        assert w.grad is not None
        assert theta.grad is not None
        assert bool((w.grad == 0).any()), "no weight is clipped: the case says nothing"
        assert_near(ours[0], w.grad)
        assert_near(ours[1], theta.grad)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_negative_scales_equal_autograd_and_mirror_the_positive(bits: int) -> None:
    """Q(w; -s) = -Q(-w; s): the weight's gradient is that of the mirror image, and so is that of log |s|."""
    grad, weight, log_scale, scheme = problem(bits)
    sign = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64).repeat(5, 1)
    w, theta = weight.clone().requires_grad_(), log_scale.clone().requires_grad_()
    (straight_through(w, theta, scheme, "official", sign) * grad).sum().backward()
    ours = lsq_backward(grad, weight, log_scale, scheme, sign=sign)
    assert w.grad is not None
    assert theta.grad is not None
    assert_near(ours[0], w.grad)
    assert_near(ours[1], theta.grad)
    mirrored = lsq_backward(-grad, -weight, log_scale, scheme)
    assert torch.equal(ours[0][:, 16:], -mirrored[0][:, 16:])
    assert torch.equal(ours[1][:, 1:], mirrored[1][:, 1:])
    value = LsqFakeQuantize.apply(weight, log_scale, scheme, "official", "none", sign)
    assert torch.equal(value[:, 16:], -fake_quantize(-weight, round_scale(log_scale.exp(), "bf16"), scheme)[:, 16:])


def test_the_masks_differ_between_the_grids_end_and_half_a_step_beyond() -> None:
    """v = 7.4 rounds to 7: inside for the official mask, outside for LSQ's."""
    weight = torch.tensor([[7.4, -8.4, 7.6, 1.2]], dtype=torch.float64)
    theta, ones = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    scheme = QuantScheme(4, 4)
    assert lsq_backward(ones, weight, theta, scheme, "official")[0].tolist() == [[1, 1, 0, 1]]
    assert lsq_backward(ones, weight, theta, scheme, "lsq")[0].tolist() == [[0, 0, 0, 1]]
    assert lsq_backward(ones, weight, theta, scheme, "pass_through")[0].tolist() == [[1, 1, 1, 1]]
    official = lsq_backward(ones, weight, theta, scheme, "official")[1].item()
    assert official == pytest.approx((7 - 7.4) + (-8 + 8.4) + 7 + (1 - 1.2))
    lsq = lsq_backward(ones, weight, theta, scheme, "lsq")[1].item()
    assert lsq == pytest.approx(7 - 8 + 7 + (1 - 1.2))


@pytest.mark.parametrize("bits", BITS)
def test_pass_through_lets_every_weight_learn_and_keeps_the_official_scale(bits: int) -> None:
    grad, weight, log_scale, scheme = problem(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w = weight.clone().requires_grad_()
    scale = stored(log_scale.exp(), "bf16").unsqueeze(-1)
    v = w.reshape(5, 3, 16) / scale
    codes = PlainClamp.apply(Round.apply(v), low, high)
    ((codes * scale).reshape(5, 48) * grad).sum().backward()
    ours = lsq_backward(grad, weight, log_scale, scheme, "pass_through")
    assert w.grad is not None
    assert_near(ours[0], w.grad)
    assert torch.equal(ours[0], grad)
    theta = log_scale.clone().requires_grad_()
    (straight_through(weight, theta, scheme, "official") * grad).sum().backward()
    assert theta.grad is not None
    assert_near(ours[1], theta.grad)


@pytest.mark.parametrize("bits", BITS)
def test_lsqs_factor_scales_the_scale_gradient_only(bits: int) -> None:
    grad, weight, log_scale, scheme = problem(bits)
    plain = lsq_backward(grad, weight, log_scale, scheme)
    scaled = lsq_backward(grad, weight, log_scale, scheme, scale_gradient="lsq")
    assert torch.equal(plain[0], scaled[0])
    assert_near(scaled[1], plain[1] / (16 * (2 ** (bits - 1) - 1)) ** 0.5)


def test_a_scale_at_the_floor_still_learns() -> None:
    """The clamp is passed straight through as the rounding is: below log 2^-14, s is 2^-14 and ds is exp(theta)."""
    scheme = QuantScheme(4, 4)
    theta = torch.tensor([[-12.0], [-9.8]], dtype=torch.float64)
    weight = torch.tensor([[1e-4, -2e-4, 3e-4, 1.0], [1e-4, -2e-4, 3e-4, 0.0]], dtype=torch.float64)
    grad = torch.tensor([[1.0, 2.0, -1.0, 0.5], [1.0, 2.0, -1.0, 0.5]], dtype=torch.float64)
    ours = lsq_backward(grad, weight, theta, scheme)
    s = 2.0**-14
    for row in range(2):
        expected = 0.0
        for g, w in zip(grad[row].tolist(), weight[row].tolist(), strict=True):
            code = round(w / s)
            expected += g * (code - w / s if -8 <= code <= 7 else max(-8, min(7, code)))
        assert ours[1][row].item() == pytest.approx(expected * torch.exp(theta[row]).item(), rel=1e-12)
    assert bool((ours[1] != 0).all())


def test_a_scale_at_the_ceiling_still_learns() -> None:
    ours = lsq_backward(torch.ones(1, 2), torch.tensor([[1e5, -1e4]]), torch.tensor([[12.0]]), QuantScheme(4, 2))
    s = 2.0**15
    expected = (round(1e5 / s) - 1e5 / s) + (round(-1e4 / s) + 1e4 / s)
    assert ours[1].item() == pytest.approx(expected * float(torch.tensor(12.0).exp()), rel=1e-5)


def test_the_backward_is_linear_in_the_gradient() -> None:
    """What makes once-per-step exact."""
    grad, weight, log_scale, scheme = problem(4)
    other = torch.randn(5, 48, dtype=torch.float64)
    first, second = lsq_backward(grad, weight, log_scale, scheme), lsq_backward(other, weight, log_scale, scheme)
    both = lsq_backward(grad + 3 * other, weight, log_scale, scheme)
    assert_near(both[0], first[0] + 3 * second[0])
    assert_near(both[1], first[1] + 3 * second[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    grad, weight, log_scale, scheme = problem(4)
    ours = lsq_backward(grad.to(dtype), weight.to(dtype), log_scale.to(dtype), scheme)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours[0].dtype == ours[1].dtype == expected
    assert ours[0].shape == (5, 48)
    assert ours[1].shape == (5, 3)


def test_the_per_forward_form_has_the_grid_value_and_the_same_gradients() -> None:
    grad, weight, log_scale, scheme = problem(4)
    w, theta = weight.clone().requires_grad_(), log_scale.clone().requires_grad_()
    value = LsqFakeQuantize.apply(w, theta, scheme, "official", "none")
    scale = stored(log_scale.exp(), "bf16").unsqueeze(-1)
    codes = (weight.reshape(5, 3, 16) / scale).round().clamp(-8, 7)
    assert torch.equal(value.detach(), (codes * scale).reshape(5, 48).bfloat16().double())
    (value * grad).sum().backward()
    reference_w, reference_theta = weight.clone().requires_grad_(), log_scale.clone().requires_grad_()
    (straight_through(reference_w, reference_theta, scheme, "official") * grad).sum().backward()
    assert w.grad is not None
    assert theta.grad is not None
    assert_near(w.grad, reference_w.grad)  # type: ignore[arg-type]
    assert_near(theta.grad, reference_theta.grad)  # type: ignore[arg-type]
