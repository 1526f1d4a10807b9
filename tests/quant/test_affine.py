"""The reference arithmetic, against plain Python numbers; idempotence over groups of every kind."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_vlm.errors import ConfigError, FormatError
from grace_vlm.quant.affine import bake, dequantize, fake_quantize, quantize, quantize_tensor, round_scale
from grace_vlm.quant.scale_init import minmax_scale, mse_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

BITS = (8, 4, 3, 2)
ROUNDINGS = ("bf16", "sig5", "fp32")
FLOAT_MAX = float(np.finfo(np.float32).max)
COUNTED = {"groups": 0}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
    return a.dtype == b.dtype and torch.equal(a.view(integers[a.dtype]), b.view(integers[b.dtype]))


def significand_bits(value: float) -> int:
    """Bits from the first to the last one of a positive number."""
    mantissa, _ = math.frexp(value)
    numerator = Fraction(mantissa).numerator
    return numerator.bit_length()


def plain_fake_quantize(weight: float, scale: float, qmin: int, qmax: int) -> float:
    """bf16(clamp(round_half_even(w / s)) s) with exact rationals; s has few bits, so w / s is rounded to FP32 once."""
    ratio = float(np.float32(weight) / np.float32(scale))
    code = min(max(round(Fraction(ratio)), qmin), qmax)
    return to_bf16(Fraction(code) * Fraction(scale))


def to_bf16(value: Fraction) -> float:
    """Round to nearest even at 8 significand bits (normal numbers)."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value))) - 7
    scaled = value / Fraction(2) ** exponent
    if abs(round(scaled)) < 128:  # log2 was one too high
        exponent -= 1
        scaled = value / Fraction(2) ** exponent
    return float(round(scaled) * Fraction(2) ** exponent)


weight_groups = st.one_of(
    st.just("normal"), st.just("zero"), st.just("outlier"), st.just("subnormal"), st.just("extreme"), st.just("halves")
)


def make_group(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    exponent = float(rng.uniform(-60, 30))
    group = rng.standard_normal(size) * 2.0**exponent
    if kind == "zero":
        group[:] = rng.choice([0.0, -0.0], size)
    elif kind == "outlier":
        group[rng.integers(size)] *= 1e4
    elif kind == "subnormal":
        group = rng.integers(-50, 50, size) * 2.0**-149
    elif kind == "extreme":
        group[rng.integers(size)] = rng.choice([FLOAT_MAX, -FLOAT_MAX])
    elif kind == "halves":  # on the borders between two codes
        group = (rng.integers(-9, 9, size) + 0.5) * 2.0 ** int(rng.integers(-20, 8))
    return group.astype(np.float32)


@settings(max_examples=420, deadline=None, derandomize=True)
@given(
    kinds=st.lists(weight_groups, min_size=24, max_size=28),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 3, 16, 128]),
    bits=st.sampled_from(BITS),
    rounding=st.sampled_from(ROUNDINGS),
    rule=st.sampled_from([minmax_scale, mse_scale]),
)
def check_groups(kinds: list[str], seed: int, size: int, bits: int, rounding: str, rule: object) -> None:
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(np.stack([make_group(kind, size, rng) for kind in kinds]))
    scheme = QuantScheme(bits, size, rounding)
    scale = rule(weight, scheme)
    once = fake_quantize(weight, scale, scheme)
    assert same_bits(once, fake_quantize(once, scale, scheme))
    # The codes themselves survive, and stay in range.
    codes = quantize(weight, scale, scheme)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) <= 2 ** (bits - 1) - 1
    assert torch.equal(codes, quantize(once, scale, scheme))
    assert same_bits(dequantize(codes, scale).float(), once)
    # No -0.0 anywhere.
    assert not bool(torch.signbit(once[once == 0]).any())
    # The scale is one that can be stored.
    assert bool(((scale >= 2.0**-14) & (scale <= 2.0**15)).all())
    limit = {"bf16": 8, "sig5": 5, "fp32": 24}[rounding]
    assert max(significand_bits(value) for value in scale.flatten().tolist()) <= limit
    assert same_bits(round_scale(scale, rounding), scale)
    COUNTED["groups"] += len(kinds)


def test_fake_quantize_is_idempotent_bit_for_bit_on_10000_groups() -> None:
    COUNTED["groups"] = 0
    check_groups()
    assert COUNTED["groups"] >= 10_000


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ["bf16", "sig5"])
def test_values_equal_exact_arithmetic(bits: int, rounding: str) -> None:
    rng = np.random.default_rng(bits)
    weight = torch.from_numpy(np.stack([make_group(k, 16, rng) for k in ("normal", "outlier", "halves") * 8]))
    weight = weight.clamp(-1e4, 1e4)
    scheme = QuantScheme(bits, 16, rounding)
    scale = minmax_scale(weight, scheme)
    ours = fake_quantize(weight, scale, scheme)
    for row in range(weight.shape[0]):
        s = scale[row, 0].item()
        expected = [plain_fake_quantize(w, s, scheme.qmin, scheme.qmax) for w in weight[row].tolist()]
        assert ours[row].tolist() == expected


def test_round_scale_by_hand() -> None:
    given_scales = torch.tensor([1.0, 1.00390625, 1.01171875, 0.0, 1e9, 2.0**-15, 1.03125, 1.09375, -3.0, -1e-6])
    expected_bf16 = [1.0, 1.0, 1.015625, 2.0**-14, 2.0**15, 2.0**-14, 1.03125, 1.09375, -3.0, -(2.0**-14)]
    assert round_scale(given_scales, "bf16").tolist() == expected_bf16
    # Steps of 1/16 above 1: 1.03125 lies half way and goes to the even 1.0, 1.09375 to 1.125.
    expected_sig5 = [1.0, 1.0, 1.0, 2.0**-14, 2.0**15, 2.0**-14, 1.0, 1.125, -3.0, -(2.0**-14)]
    assert round_scale(given_scales, "sig5").tolist() == expected_sig5
    kept = round_scale(given_scales, "fp32").tolist()
    assert kept == [1.0, 1.00390625, 1.01171875, 2.0**-14, 2.0**15, 2.0**-14, 1.03125, 1.09375, -3.0, -(2.0**-14)]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_round_scale_stays_in_range_at_its_ends_and_keeps_the_dtype(rounding: str) -> None:
    ends = torch.tensor(
        [2.0**-14, math.nextafter(2.0**-14, 1), math.nextafter(2.0**15, 0), 2.0**15], dtype=torch.float64
    )
    rounded = round_scale(ends, rounding)
    assert rounded.dtype == torch.float64
    assert bool(((rounded >= 2.0**-14) & (rounded <= 2.0**15)).all())
    # Every stored scale is exact in FP16 once it has 11 bits or fewer.
    if rounding != "fp32":
        assert torch.equal(rounded.to(torch.float16).to(torch.float64), rounded)


def test_sig5_products_are_the_same_number_in_bf16_fp16_and_fp32() -> None:
    """Constraint B: a W4 code times a 5-bit scale has at most 8 bits."""
    scheme = QuantScheme(4, 4, "sig5")
    scale = round_scale(torch.rand(64, 1) * 4 + 0.01, "sig5")
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4).repeat(16, 1)
    exact = codes.double() * scale.double()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(dequantize(codes, scale, dtype).double(), exact)
    assert torch.equal(bake(QuantizedTensor(codes, scale.to(torch.bfloat16), scheme)).double(), exact)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_then_bake_is_fake_quantize(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 64, generator=generator) * 0.05
    for rounding in ROUNDINGS:
        scheme = QuantScheme(bits, 32, rounding)
        raw = weight.reshape(6, 2, 32).abs().amax(-1) / scheme.qmax * 0.9137
        tensor = quantize_tensor(weight, raw, scheme)
        stored = round_scale(raw, rounding)
        assert tensor.scheme == scheme
        assert tensor.shape == (6, 64)
        assert tensor.scale.dtype == (torch.float32 if rounding == "fp32" else torch.bfloat16)
        assert torch.equal(tensor.scale.float(), stored)
        baked = bake(tensor)
        assert baked.dtype == torch.bfloat16
        assert same_bits(baked, fake_quantize(weight, stored, scheme).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_value_comes_back_in_the_weights_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 32).to(dtype)
    scheme = QuantScheme(4, 16)
    scale = minmax_scale(weight, scheme)
    value = fake_quantize(weight, scale, scheme)
    assert value.dtype == dtype
    assert torch.equal(value, value.to(torch.bfloat16).to(dtype))
    assert same_bits(value, fake_quantize(value, scale, scheme))


def test_without_a_value_dtype_the_product_is_left_alone() -> None:
    scheme = QuantScheme(8, 4)
    weight = torch.tensor([[0.1, -0.33, 1.27, 1.0]], dtype=torch.float64)
    scale = torch.tensor([[0.01]], dtype=torch.float64)
    value = fake_quantize(weight, scale, scheme, value_dtype=None)
    assert value.tolist() == [[10 * 0.01, -33 * 0.01, 127 * 0.01, 100 * 0.01]]


def test_half_goes_to_the_even_code_and_codes_are_clamped() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 100.0, -100.0]])
    codes = quantize(weight, torch.tensor([[1.0]]), QuantScheme(4, 8))
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 7, -8]]


def test_groups_run_along_in_features() -> None:
    weight = torch.tensor([[1.0, 1.0, 4.0, 4.0], [2.0, 2.0, 8.0, 8.0]])
    scale = torch.tensor([[1.0, 4.0], [2.0, 8.0]])
    assert quantize(weight, scale, QuantScheme(4, 2)).tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, -8]], dtype=torch.int8)
    expected = [[1.0, 2.0, 12.0, 16.0], [10.0, 12.0, 56.0, -64.0]]
    assert dequantize(codes, scale, torch.float32).tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weight", "scale"])
def test_a_weight_that_is_not_finite_is_refused(bad: float, where: str) -> None:
    weight, scale = torch.ones(2, 16), torch.ones(2, 1)
    (weight if where == "weight" else scale)[1, 0] = bad
    with pytest.raises(FormatError) as caught:
        quantize_tensor(weight, scale, QuantScheme(4, 16))
    assert str(caught.value) == "cannot quantize a weight with NaN or Inf in it; look at the step that made it"


def test_a_group_size_that_does_not_divide_is_refused_everywhere() -> None:
    weight, scheme = torch.ones(2, 96), QuantScheme(4, 128)
    calls = [
        lambda: quantize(weight, torch.ones(2, 1), scheme),
        lambda: fake_quantize(weight, torch.ones(2, 1), scheme),
        lambda: quantize_tensor(weight, torch.ones(2, 1), scheme),
        lambda: minmax_scale(weight, scheme),
        lambda: mse_scale(weight, scheme),
    ]
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == ("group size 128 does not divide in_features 96 of this weight; use w4g32")


def test_bits_of_minus_zero_do_not_reach_a_file() -> None:
    weight = torch.tensor([[-0.0, -0.3, 0.3, -1e-30]])
    value = fake_quantize(weight, torch.tensor([[1.0]]), QuantScheme(4, 4)).to(torch.bfloat16)
    assert [struct.pack("<h", bits) for bits in value.view(torch.int16).flatten().tolist()] == [b"\0\0"] * 4
