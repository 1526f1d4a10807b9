"""Where scales start: min-max by hand, the grid search against a search written apart."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.quant.affine import fake_quantize
from grace_vlm.quant.scale_init import init_scale, minmax_scale, mse_scale, signed_scale
from grace_vlm.quant.scheme import QuantScheme

BITS = (8, 4, 3, 2)


def squared_error(group: torch.Tensor, scale: float, scheme: QuantScheme) -> float:
    codes = torch.clamp(
        torch.round(group.double() / scale), -(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1
    )
    return float(((codes * scale - group.double()) ** 2).sum())


def heavy_tailed(bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 256, generator=generator) * 0.03
    weight[::3, ::50] *= 8
    return weight


def test_minmax_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.5, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-14.0, 0.5, 0.5, 0.5]])
    assert minmax_scale(weight, QuantScheme(4, 4)).tolist() == [[1.0], [2.0**-14], [2.0]]
    assert minmax_scale(weight[:1], QuantScheme(2, 4)).tolist() == [[7.0]]
    assert minmax_scale(weight, QuantScheme(8, 4)).dtype == torch.float32


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ["bf16", "sig5", "fp32"])
def test_mse_scale_is_the_best_of_the_twenty_candidates(bits: int, rounding: str) -> None:
    weight = heavy_tailed(bits)
    scheme = QuantScheme(bits, 64, rounding)
    chosen = mse_scale(weight, scheme)
    for row in range(0, 24, 5):
        for group in range(4):
            values = weight[row, group * 64 : (group + 1) * 64]
            peak = float(values.abs().max()) / (2 ** (bits - 1) - 1)
            candidates = torch.tensor([peak * (0.3 + 0.9 * i / 19) for i in range(20)])
            if rounding == "bf16":
                candidates = candidates.bfloat16().float()
            elif rounding == "sig5":
                exponent = torch.floor(torch.log2(candidates)) - 4
                candidates = torch.round(candidates * 2.0**-exponent) * 2.0**exponent
            errors = [squared_error(values, s, scheme) for s in candidates.clamp(2.0**-14, 2.0**15).tolist()]
            ours = squared_error(values, chosen[row, group].item(), scheme)
            assert ours <= min(errors) * (1 + 1e-5)
            assert ours >= min(errors) * (1 - 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_mse_loses_no_more_than_minmax_up_to_the_spacing_of_its_candidates(bits: int) -> None:
    """min-max itself is no candidate (0.3 + 0.9 i / 19 skips 1), so 8 bits may lose a little; fewer may not."""
    weight = heavy_tailed(bits)
    scheme = QuantScheme(bits, 128)
    total = {"minmax": 0.0, "mse": 0.0}
    for rule in total:
        scale = init_scale(weight, scheme, rule)  # type: ignore[arg-type]
        for row in range(24):
            for group in range(2):
                values = weight[row, group * 128 : (group + 1) * 128]
                total[rule] += squared_error(values, scale[row, group].item(), scheme)
    assert total["mse"] <= total["minmax"] * (1.05 if bits == 8 else 1.0)
    if bits <= 3:
        assert total["mse"] < 0.9 * total["minmax"]


@pytest.mark.parametrize("bits", BITS)
def test_a_signed_scale_puts_the_extra_code_at_the_longer_tail(bits: int) -> None:
    """It errs as the better of both signs does, group by group; on Gaussian weights a tenth less than ``mse`` below
    eight bits."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(bits)) * 0.03
    scheme = QuantScheme(bits, 64)

    def error(of: torch.Tensor) -> torch.Tensor:
        return (of - weight).square().reshape(64, 8, 64).sum(-1)

    chosen = signed_scale(weight, scheme)
    above, below = mse_scale(weight, scheme), mse_scale(-weight, scheme)
    errors = error(fake_quantize(weight, above, scheme, None)), error(-fake_quantize(-weight, below, scheme, None))
    found = error(fake_quantize(weight, chosen, scheme, None))
    assert torch.allclose(found, torch.minimum(*errors), rtol=1e-4)  # sums in another order may choose the other
    assert bool(((chosen == above) | (chosen == -below)).all())
    assert 0.3 < float((chosen < 0).float().mean()) < 0.7 or bits == 8  # nothing is clipped there: ties
    assert float(found.sum()) <= float(errors[0].sum()) * (0.93 if bits < 8 else 1.0)
    tail = torch.tensor([[1.5, -1.5, 1.5, 3.0], [1.5, -1.5, 1.5, -3.0]])
    assert signed_scale(tail, QuantScheme(2, 4)).sign().tolist() == [[-1.0], [1.0]]


def test_a_zero_group_gets_the_smallest_scale() -> None:
    for rule in ("minmax", "mse", "mse_signed"):
        assert init_scale(torch.zeros(1, 16), QuantScheme(4, 16), rule).tolist() == [[2.0**-14]]  # type: ignore[arg-type]


def test_a_weight_at_the_end_of_the_floats_has_a_scale() -> None:
    peak = torch.finfo(torch.float32).max
    weight = torch.tensor([[peak, 1.0], [-peak, peak]])
    for rule in ("minmax", "mse"):
        for bits in BITS:
            assert init_scale(weight, QuantScheme(bits, 2), rule).tolist() == [[2.0**15], [2.0**15]]  # type: ignore[arg-type]


def test_fp64_weights_get_fp64_scales() -> None:
    weight = torch.randn(2, 16, dtype=torch.float64)
    assert minmax_scale(weight, QuantScheme(4, 8)).dtype == torch.float64
    assert mse_scale(weight, QuantScheme(4, 8)).dtype == torch.float64
