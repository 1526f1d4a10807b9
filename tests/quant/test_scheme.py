"""Schemes: what parses, what is refused, and in which words."""

from __future__ import annotations

import pytest

from grace_vlm.errors import ConfigError
from grace_vlm.quant.scheme import QuantScheme, parse_scheme


@pytest.mark.parametrize(
    ("text", "bits", "group", "qmin", "qmax"),
    [("w8g128", 8, 128, -128, 127), ("w4g128", 4, 128, -8, 7), ("w3g64", 3, 64, -4, 3), ("w2g7", 2, 7, -2, 1)],
)
def test_a_scheme_says_its_bits_group_and_range(text: str, bits: int, group: int, qmin: int, qmax: int) -> None:
    scheme = parse_scheme(text, "sig5")
    assert scheme == QuantScheme(bits, group, "sig5")
    assert (scheme.qmin, scheme.qmax, scheme.name) == (qmin, qmax, text)


def test_bf16_is_the_absence_of_a_grid() -> None:
    assert parse_scheme("bf16") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w5g128",
        "w4",
        "w4g",
        "w4g0",
        "w4g-1",
        "w4g012",
        "W4G128",
        "w4g128 ",
        "w16g128",
        "int4",
        "BF16",
        "w4g12\n",
        "w4g1234567890",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scheme(text)
    assert str(caught.value) == f"unknown scheme {text!r}; expected bf16 or w{{8,4,3,2}}g{{N}}, for example w4g128"


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (QuantScheme(4, 128), 4.125),
        (QuantScheme(8, 128), 8.125),
        (QuantScheme(2, 32), 2.5),
        (QuantScheme(4, 128, "fp32"), 4.25),
    ],
)
def test_bits_per_weight_count_the_scales(scheme: QuantScheme, bits: float) -> None:
    assert scheme.bits_per_weight == bits


@pytest.mark.parametrize(
    ("group", "in_features", "hint"),
    [
        (128, 192, "use w4g64"),
        (128, 96, "use w4g32"),
        (64, 48, "use w4g16"),
        (128, 100, "keep this layer in bf16"),
    ],
)
def test_a_group_size_that_does_not_divide_is_an_error(group: int, in_features: int, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantScheme(4, group).check(8, in_features, "layers.0.q_proj")
    assert str(caught.value) == (
        f"group size {group} does not divide in_features {in_features} of layers.0.q_proj; {hint}"
    )


def test_a_scheme_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        QuantScheme(4, 128).num_bits = 8  # type: ignore[misc]
