"""The few numbers of an analysis that a terminal, or a table of a page, shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def summary_lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value with its interval where it has one) of each part that is there."""
    lines: list[tuple[str, str]] = []
    if result["entropy"]:
        for name, said in (("first", "first tokens of answers"), ("all", "supervised tokens")):
            one = result["entropy"][name]
            r = one["pearson"]
            lines.append((said, f"{one['num_tokens']:,} in {one['num_rows']:,} rows"))
            lines.append(("  the teacher errs on", _share(one["error_rate"])))
            lines.append(
                ("  Pearson r of entropy and error", f"{_form(r['r'])} [{_form(r['low'])}, {_form(r['high'])}]")
            )
            for kind in ("equal_widths", "equal_counts"):
                bins = f"  R² over {len(one[kind]['bins'])} bins of {kind.replace('_', ' ')}"
                lines.append((bins, _form(one[kind]["line"]["r_squared"])))
        gate = result["gate"]
        lines.append(("gate, mean of right and of wrong", f"{_form(gate['mean_right'])}, {_form(gate['mean_wrong'])}"))
    if result["cka"]:
        lines.append(("CKA with the teacher where it is tapped", _form(result["cka"]["tapped"])))
    if result["cka_before"]:
        lines.append(("  before", _form(result["cka_before"]["tapped"])))
    if result["layers"]:
        for layer in result["layers"]["layers"]:
            said = f"{layer['output_error']:.4f}, {layer['kl']:.2e} nats"
            lines.append((f"layer {layer['layer']}: output error, KL", said))
        whole = result["layers"]["whole"]
        lines += _kinds_of_linears(result["layers"].get("linears") or [])
        lines.append(("all layers: KL, likeliest words changed", f"{whole['kl']:.2e} nats, {_share(whole['flips'])}"))
    for name, part in (result["codes"] or {"schemes": {}})["schemes"].items():
        used = f"{part['bits_used']:.3f}, {_share(part['share_at_ends'])} at the ends"
        lines.append((f"{name}: bits used of its codes", used))
    return lines


def _kinds_of_linears(linears: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Effects of the linears of one name, each alone, added up over layers, and the layer of the largest."""
    lines = []
    for name in dict.fromkeys(one["linear"] for one in linears):
        own = [one for one in linears if one["linear"] == name]
        worst = max(own, key=lambda one: one["kl"])
        said = f"{sum(one['kl'] for one in own):.2e} nats, most in layer {worst['layer']}: {worst['kl']:.2e}"
        lines.append((f"{name} alone, sum of layers", said))
    return lines


def _form(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
