"""Which linear gets which grid: decided once, printed before training, stored with the model.

A plan starts from the adapter's pattern of quantizable linears and one scheme; overrides are (pattern, scheme) pairs
applied in order, the last match wins. Nothing is silent: a pattern that matches no linear and a group size that does
not divide are errors, and every linear of the model is listed, quantized or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grace_vlm.errors import ConfigError
from grace_vlm.quant.scheme import QuantScheme, ScaleRounding, parse_scheme


@dataclass(frozen=True)
class PlanEntry:
    """One linear: module name, (out_features, in_features), and its grid (None: BF16)."""

    name: str
    out_features: int
    in_features: int
    scheme: QuantScheme | None

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.out_features * self.in_features

    @property
    def stored_bytes(self) -> float:
        """Bytes once packed: codes and scales, or BF16."""
        bits = self.scheme.bits_per_weight if self.scheme else 16
        return self.out_features * self.in_features * bits / 8


@dataclass(frozen=True)
class QuantPlan:
    """Every linear of a model in order, with its scheme."""

    entries: tuple[PlanEntry, ...]

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """Module name -> scheme, of the quantized ones only."""
        return {entry.name: entry.scheme for entry in self.entries if entry.scheme is not None}

    @property
    def bf16_names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries if entry.scheme is None)

    def to_json(self) -> dict[str, Any]:
        """The content of ``grid/plan.json`` (design: a model folder)."""
        linears = [
            {
                "name": entry.name,
                "scheme": entry.scheme.name,
                "scale_rounding": entry.scheme.scale_rounding,
                "out_features": entry.out_features,
                "in_features": entry.in_features,
            }
            for entry in self.entries
            if entry.scheme is not None
        ]
        return {"format_version": 1, "linears": linears, "bf16": list(self.bf16_names)}

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows (name, shape, scheme, bytes in BF16, bytes stored) for printing."""
        return [
            (
                entry.name,
                f"{entry.out_features} x {entry.in_features}",
                entry.scheme.name if entry.scheme else "bf16",
                f"{entry.bf16_bytes:,}",
                f"{entry.stored_bytes:,.0f}",
            )
            for entry in self.entries
        ]


def make_plan(
    linears: Mapping[str, tuple[int, int]],
    quantizable: str,
    scheme: str,
    overrides: Sequence[tuple[str, str]] = (),
    scale_rounding: ScaleRounding = "bf16",
) -> QuantPlan:
    """Decide the grid of every linear.

    Args:
        linears: module name -> (out_features, in_features), in model order.
        quantizable: regular expression (full match on the module name) of what ``scheme`` applies to.
        scheme: ``"w4g128"``, ``"bf16"``, ...
        overrides: (regular expression, scheme) pairs; the last match wins.

    Raises:
        ConfigError: a pattern that matches nothing or is no regular expression, a group size that does not divide.
    """
    chosen: dict[str, QuantScheme | None] = dict.fromkeys(linears)
    for pattern, text in [(quantizable, scheme), *overrides]:
        try:
            matched = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from error
        if not matched:
            raise ConfigError(
                f"pattern {pattern!r} matches none of the {len(linears)} linears; "
                f"names look like {next(iter(linears), 'nothing')!r} (see grace inspect)"
            )
        chosen.update(dict.fromkeys(matched, parse_scheme(text, scale_rounding)))
    entries = tuple(PlanEntry(name, *shape, chosen[name]) for name, shape in linears.items())
    for entry in entries:
        if entry.scheme is not None:
            entry.scheme.check(entry.out_features, entry.in_features, entry.name)
    return QuantPlan(entries)
