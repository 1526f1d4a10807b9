"""Which linear gets which grid: decided once, printed before training, stored with the model.

A plan starts from the adapter's pattern of quantizable linears and one scheme; overrides are (pattern, scheme) pairs
applied in order, the last match wins. Nothing is silent: a pattern that matches no linear and a group size that does
not divide are errors, and every linear of the model is listed, quantized or not.

A head that is tied to the embedding is one matrix: it is listed, but the embedding carries its bytes and its grid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from grace_vlm.errors import ConfigError
from grace_vlm.quant.scheme import QuantScheme, ScaleRounding, parse_scheme

Part = Literal["language", "projector", "tower", "head"]
"""Where a linear stands: decoder layers, what carries vision into them, the vision tower, embedding and head."""

_WHY_BF16 = {
    "language": "in the language model, which the recipe keeps in BF16 (scheme, quant.overrides)",
    "projector": "the paper keeps the projector (quant.projector gives it a grid)",
    "tower": "the paper keeps the vision tower (quant.tower gives it a grid)",
    "head": "the paper keeps embedding and head (quant.head gives them a grid)",
    None: "in no part that the adapter names (quant.overrides gives it a grid)",
}


class LinearShape(NamedTuple):
    """A weight matrix that could have a grid.

    ``tied_to`` is the module whose weight it shares (a head tied to the embedding), else None.
    """

    out_features: int
    in_features: int
    part: Part | None = None
    tied_to: str | None = None
    is_embedding: bool = False


@dataclass(frozen=True)
class PlanEntry:
    """One linear (or embedding): module name, (out_features, in_features), and its grid (None: BF16)."""

    name: str
    out_features: int
    in_features: int
    scheme: QuantScheme | None
    part: Part | None = None
    tied_to: str | None = None
    is_embedding: bool = False

    @property
    def bf16_bytes(self) -> int:
        return 0 if self.tied_to else 2 * self.out_features * self.in_features

    @property
    def num_scales(self) -> int:
        return self.out_features * self.in_features // self.scheme.group_size if self.scheme else 0

    @property
    def stored_bytes(self) -> float:
        """Bytes once packed: codes and scales, or BF16."""
        bits = self.scheme.bits_per_weight if self.scheme else 16
        return self.bf16_bytes * bits / 16

    @property
    def why_bf16(self) -> str:
        """Why it has no grid; empty if it has one."""
        if self.tied_to:
            return f"is the matrix of {self.tied_to}"
        return "" if self.scheme else _WHY_BF16[self.part]


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
        """The linears (no embeddings) that have no grid, their own or one they share."""
        quantized = self.schemes
        return tuple(
            entry.name
            for entry in self.entries
            if entry.scheme is None and not entry.is_embedding and entry.tied_to not in quantized
        )

    def to_json(self, stored: Callable[[str], str] = str) -> dict[str, Any]:
        """The content of ``grid/plan.json`` (design: a model folder); ``stored`` gives the name in files."""
        linears = [
            {
                "name": stored(entry.name),
                "scheme": entry.scheme.name,
                "scale_rounding": entry.scheme.scale_rounding,
                "out_features": entry.out_features,
                "in_features": entry.in_features,
            }
            for entry in self.entries
            if entry.scheme is not None
        ]
        return {"format_version": 1, "linears": linears, "bf16": [stored(name) for name in self.bf16_names]}

    def summary(self) -> list[str]:
        """One line a part and scheme: how many matrices, bytes before and after, and why where there is no grid."""
        groups: dict[tuple[str, str, str], list[PlanEntry]] = {}
        for entry in self.entries:
            if entry.tied_to is None:
                name = entry.scheme.name if entry.scheme else "bf16"
                groups.setdefault((entry.part or "other", name, entry.why_bf16), []).append(entry)
        return [
            f"{part}: {len(members)} x {name}, {sum(e.bf16_bytes for e in members):,} bytes -> "
            f"{sum(e.stored_bytes for e in members):,.0f}{f'; {why}' if why else ''}"
            for (part, name, why), members in groups.items()
        ]

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
    linears: Mapping[str, LinearShape | tuple[int, int]],
    quantizable: str,
    scheme: str,
    overrides: Sequence[tuple[str, str]] = (),
    scale_rounding: ScaleRounding = "bf16",
) -> QuantPlan:
    """Decide the grid of every linear.

    Args:
        linears: module name -> shape, in model order.
        quantizable: regular expression (full match on the module name) of what ``scheme`` applies to.
        scheme: ``"w4g128"``, ``"bf16"``, ...
        overrides: (regular expression, scheme) pairs; the last match wins.

    Raises:
        ConfigError: a pattern that matches nothing or is no regular expression, a group size that does not divide.
    """
    shapes = {name: LinearShape(*shape) for name, shape in linears.items()}
    chosen: dict[str, QuantScheme | None] = dict.fromkeys(linears)
    for pattern, text in [(quantizable, scheme), *overrides]:
        try:
            matched = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from error
        if not matched:
            raise ConfigError(
                f"pattern {pattern!r} matches none of the {sum(not s.is_embedding for s in shapes.values())} linears; "
                f"names look like {next(iter(linears), 'nothing')!r} (see grace inspect)"
            )
        owners = [shapes[name].tied_to or name for name in matched]
        chosen.update(dict.fromkeys(owners, parse_scheme(text, scale_rounding)))
    entries = tuple(
        PlanEntry(name, shape.out_features, shape.in_features, chosen[name], *shape[2:])
        for name, shape in shapes.items()
    )
    for entry in entries:
        if entry.scheme is not None:
            entry.scheme.check(entry.out_features, entry.in_features, entry.name)
    return QuantPlan(entries)
