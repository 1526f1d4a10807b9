"""GPTQ against the O(n^4) form of its equations, and against rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grace_vlm.errors import FormatError, NonFiniteError
from grace_vlm.ptq.awq import output_error
from grace_vlm.ptq.gptq import gptq_quantize
from grace_vlm.quant import QuantScheme, dequantize, init_scale, quantize_tensor


def problem(
    out: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, Hessian) with correlated inputs, of which some are loud."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * size, size // 4, generator=generator, dtype=torch.float64) @ mix[: size // 4]
    x = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x = x * torch.randn(size, generator=generator, dtype=torch.float64).exp()
    weight = torch.randn(out, size, generator=generator, dtype=torch.float64) * 0.1
    return weight.to(dtype), (x.T @ x / len(x)).to(dtype)


def plain_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, rule: Any, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) by optimal brain quantization in a fixed order: the inverse of what is left, made anew."""
    left = weight.clone()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    codes, scales = torch.zeros_like(left), []
    for column in range(left.shape[1]):
        if column % scheme.group_size == 0:
            scales.append(init_scale(left[:, column : column + scheme.group_size], scheme, rule)[:, 0])
        codes[:, column] = (left[:, column] / scales[-1]).round().clamp(scheme.qmin, scheme.qmax)
        error = left[:, column] - codes[:, column] * scales[-1]
        inverse = torch.linalg.inv(damped[column:, column:])
        left[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes.to(torch.int8), torch.stack(scales, dim=1)


@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize(("size", "group"), [(192, 64), (160, 32), (288, 96), (384, 192)])
def test_equals_its_equations(size: int, group: int, rule: Any) -> None:
    weight, hessian = problem(6, size)
    scheme = QuantScheme(4, group)
    found = gptq_quantize(weight, hessian, scheme, rule, damping=0.05)
    codes, scale = plain_gptq(weight, hessian, scheme, rule, 0.05)
    assert torch.equal(found.scale, scale.to(torch.bfloat16))
    assert torch.equal(found.codes, codes)
    assert int(found.codes.min()) >= scheme.qmin
    assert int(found.codes.max()) <= scheme.qmax
    rounded = quantize_tensor(weight, init_scale(weight, scheme, rule), scheme)
    assert not torch.equal(found.codes, rounded.codes), "the compensation did nothing"


@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_errs_less_than_rounding(bits: int, rule: Any) -> None:
    scheme = QuantScheme(bits, 64)
    for seed in range(3):
        weight, hessian = problem(32, 256, seed, torch.float32)
        ours = gptq_quantize(weight, hessian, scheme, rule)
        rtn = quantize_tensor(weight, init_scale(weight, scheme, rule), scheme)
        errors = [output_error(dequantize(t.codes, t.scale, torch.float32) - weight, hessian) for t in (ours, rtn)]
        assert errors[0] < 0.8 * errors[1]


def test_independent_inputs_have_nothing_to_make_up_for() -> None:
    weight, _ = problem(8, 128)
    scheme = QuantScheme(4, 64)
    found = gptq_quantize(weight, torch.diag(torch.linspace(1, 9, 128)), scheme, "mse")
    rtn = quantize_tensor(weight, init_scale(weight, scheme, "mse"), scheme)
    assert torch.equal(found.codes, rtn.codes)
    assert torch.equal(found.scale, rtn.scale)


def test_inputs_that_are_never_used_change_nothing() -> None:
    """Not through the damping either: it is a share of the mean over the used ones."""
    weight, hessian = problem(8, 128)
    hessian *= 1e-4
    wide = torch.cat([weight, torch.ones(8, 64, dtype=torch.float64)], dim=1)
    with_dead = torch.zeros(192, 192, dtype=torch.float64)
    with_dead[:128, :128] = hessian
    scheme = QuantScheme(4, 64)
    found, alone = gptq_quantize(wide, with_dead, scheme, "mse"), gptq_quantize(weight, hessian, scheme, "mse")
    assert torch.equal(found.codes[:, :128], alone.codes)
    assert torch.equal(found.scale[:, :2], alone.scale)
    assert int(found.codes[:, 128:].abs().max()) == 0
    nothing = gptq_quantize(weight, torch.zeros(128, 128), scheme, "mse")
    assert int(nothing.codes.abs().max()) == 0


def test_a_weight_that_is_not_finite() -> None:
    weight, hessian = problem(8, 128)
    scheme = QuantScheme(4, 64)
    weight[3, 3] = torch.inf
    with pytest.raises(FormatError, match=r"^cannot quantize a weight with NaN or Inf in it; look at"):
        gptq_quantize(weight, hessian, scheme, "mse")


def test_a_hessian_without_an_inverse() -> None:
    for hessian in (torch.ones(64, 64), torch.full((64, 64), torch.nan)):
        with pytest.raises(NonFiniteError, match=r"^a calibration Hessian cannot be inverted; calibrate on more rows$"):
            gptq_quantize(torch.ones(2, 64), hessian, QuantScheme(4, 64), "mse", damping=0.0)
