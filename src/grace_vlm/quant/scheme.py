"""What a grid is: bits, group size, and the record that carries a weight on it.

A scheme is written ``w{bits}g{group}``: ``w4g128`` is the product, ``w8g128`` its careful sibling; 3 and 2 bits are
for study. Codes are signed and symmetric without a zero point, ``q in [-2^(b-1), 2^(b-1) - 1]``; one scale serves
``group_size`` consecutive weights along ``in_features``. ``bf16`` is the absence of a grid and parses to ``None``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from grace_vlm.errors import ConfigError

ScaleRounding = Literal["bf16", "sig5", "fp32"]
"""How a scale is stored, and therefore what training uses (``docs/formats.md``, "Exactness").

``bf16``: rounded to BF16, clamped to [2^-14, 2^15] (constraint A, default). ``sig5``: rounded to 5 significand bits
besides (constraint B: ``q*s`` is then the same real number in BF16, FP16 and FP32). ``fp32``: what the official
implementation trains; not exact once a format stores 16 bits.
"""

_PATTERN = re.compile(r"w([2348])g([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class QuantScheme:
    """A symmetric group-wise integer grid for a weight matrix.

    Args:
        num_bits: 8, 4, 3 or 2.
        group_size: consecutive input features that share one scale.
        scale_rounding: see ``ScaleRounding``.
    """

    num_bits: int
    group_size: int
    scale_rounding: ScaleRounding = "bf16"

    @property
    def qmin(self) -> int:
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.num_bits - 1)) - 1

    @property
    def name(self) -> str:
        return f"w{self.num_bits}g{self.group_size}"

    @property
    def bits_per_weight(self) -> float:
        """Code bits plus the share of a 16-bit scale (32-bit under ``fp32``)."""
        return self.num_bits + (32 if self.scale_rounding == "fp32" else 16) / self.group_size

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise ``ConfigError`` if a (out_features, in_features) weight has no whole number of groups."""
        if in_features % self.group_size:
            fitting = [g for g in (128, 64, 32, 16) if in_features % g == 0]
            hint = f"use w{self.num_bits}g{fitting[0]}" if fitting else "keep this layer in bf16"
            raise ConfigError(
                f"group size {self.group_size} does not divide in_features {in_features} of {where}; {hint}"
            )


def parse_scheme(text: str, scale_rounding: ScaleRounding = "bf16") -> QuantScheme | None:
    """``"bf16"`` -> None, ``"w4g128"`` -> ``QuantScheme(4, 128)``; anything else is a ``ConfigError``."""
    if text == "bf16":
        return None
    match = _PATTERN.fullmatch(text)
    if not match:
        raise ConfigError(f"unknown scheme {text[:80]!r}; expected bf16 or w{{8,4,3,2}}g{{N}}, for example w4g128")
    return QuantScheme(int(match[1]), int(match[2]), scale_rounding)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight on its grid: the only form in which rooms above ``quant`` exchange one.

    Args:
        codes: (out_features, in_features) int8, in [qmin, qmax].
        scale: (out_features, in_features / group_size) BF16 (``bf16``, ``sig5``) or FP32 (``fp32``), not zero;
            negative where the group's longer tail is above zero (``scale_init.signed_scale``).
        scheme: the grid.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    scheme: QuantScheme

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])
