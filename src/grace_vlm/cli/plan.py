"""``grace plan``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import typer

from grace_vlm.cli.output import emit_json, print_table

if TYPE_CHECKING:
    from grace_vlm.models.adapter import Adapter
    from grace_vlm.quant.plan import PlanEntry, QuantPlan

HELP = """Say which linear gets which grid, what it saves, and which formats can hold it. Reads no weights.

Example: grace plan Qwen/Qwen3-VL-2B-Instruct --scheme w4g128 --tower w8g128"""


def plan_command(
    model: str = typer.Argument(..., help="Model folder, run folder, or hub id (published ones need no hub)."),
    scheme: str = typer.Option("w4g128", "--scheme", help="Of the language model: bf16 or w{8,4,3,2}g{N}."),
    projector: str = typer.Option(None, "--projector", help="Scheme of the merger or projector; default: BF16."),
    tower: str = typer.Option(None, "--tower", help="Scheme of the vision tower; default: BF16."),
    head: str = typer.Option(None, "--head", help="Scheme of embedding and head; default: BF16."),
    override: list[str] = typer.Option([], "--override", help="PATTERN=SCHEME of module names; the last match wins."),
    every: bool = typer.Option(False, "--all", help="One line a linear instead of one a kind."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.errors import ConfigError
    from grace_vlm.models.adapter import plan_model
    from grace_vlm.models.load import describe_model

    overrides = []
    for text in override:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"--override {text!r} is not PATTERN=SCHEME, for example '.*down_proj=w8g128'")
        overrides.append((pattern, value))
    described, adapter = describe_model(model)
    parts: dict[Any, str | None] = {"projector": projector, "tower": tower, "head": head}
    chosen = {part: text for part, text in parts.items() if text is not None}
    plan = plan_model(described, adapter, scheme, chosen, overrides)
    facts = plan_facts(model, described, adapter, plan)
    if as_json:
        emit_json(facts)
        return
    print_plan(plan, every)
    print_facts(facts)


def plan_facts(name: str, model: Any, adapter: Adapter, plan: QuantPlan) -> dict[str, Any]:
    """What ``--json`` says of a plan."""
    from grace_vlm.formats.registry import refusals

    quantized = [entry for entry in plan.entries if entry.scheme is not None]
    stored = {f"{entry.name}.weight": entry for entry in quantized}
    parts = {part: {"parameters": 0, "bf16_bytes": 0, "stored_bytes": 0} for part in (*adapter.parts, "other")}
    for tensor_name, parameter in model.named_parameters():
        part = _part_of(adapter, tensor_name.rpartition(".")[0])
        tally, num_bytes = parts[part], 2 * parameter.numel()
        tally["parameters"] += parameter.numel()
        tally["bf16_bytes"] += num_bytes
        tally["stored_bytes"] += round(stored[tensor_name].stored_bytes) if tensor_name in stored else num_bytes
    return {
        "model": name,
        "model_type": adapter.model_type,
        "num_linears": len(quantized),
        "num_scales": sum(entry.num_scales for entry in quantized),
        "num_parameters": sum(part["parameters"] for part in parts.values()),
        "bf16_bytes": sum(part["bf16_bytes"] for part in parts.values()),
        "stored_bytes": sum(part["stored_bytes"] for part in parts.values()),
        "bytes_by_part": parts,
        "formats": refusals(plan, adapter),
        "linears": [_entry_facts(entry) for entry in plan.entries],
    }


def _part_of(adapter: Adapter, module: str) -> str:
    """The part of a parameter's module; norms, patch embeddings and the like are ``other``."""
    return next((part for part, pattern in adapter.parts.items() if re.fullmatch(pattern, module)), "other")


def _entry_facts(entry: PlanEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "part": entry.part,
        "out_features": entry.out_features,
        "in_features": entry.in_features,
        "scheme": entry.scheme.name if entry.scheme else "bf16",
        "num_scales": entry.num_scales,
        "bf16_bytes": entry.bf16_bytes,
        "stored_bytes": round(entry.stored_bytes),
        "why_bf16": entry.why_bf16 or None,
    }


def print_plan(plan: QuantPlan, every: bool = False) -> None:
    """A table of the linears; layers that differ in their number only are one line unless ``every``."""
    groups: dict[tuple[Any, ...], list[PlanEntry]] = {}
    for entry in plan.entries:
        label = entry.name if every else re.sub(r"\.\d+(?=\.|$)", ".N", entry.name)
        scheme = entry.scheme.name if entry.scheme else "bf16"
        key = (label, f"{entry.out_features} x {entry.in_features}", scheme, entry.why_bf16)
        groups.setdefault(key, []).append(entry)
    rows = [
        (
            label,
            str(len(members)),
            shape,
            scheme,
            f"{sum(e.bf16_bytes for e in members):,}",
            f"{sum(e.stored_bytes for e in members):,.0f}",
        )
        for (label, shape, scheme, _), members in groups.items()
    ]
    print_table(("linear", "count", "out x in", "scheme", "bf16 bytes", "stored bytes"), rows)
    for why in dict.fromkeys(key[3] for key in groups if key[3]):
        names = [key[0] for key in groups if key[3] == why]
        print(f"bf16: {', '.join(names)}: {why}")


def print_facts(facts: dict[str, Any]) -> None:
    """The sums of a plan and the formats that can hold it."""
    rows = [
        (part, f"{sums['parameters']:,}", f"{sums['bf16_bytes']:,}", f"{sums['stored_bytes']:,}")
        for part, sums in facts["bytes_by_part"].items()
    ]
    total = ("total", f"{facts['num_parameters']:,}", f"{facts['bf16_bytes']:,}", f"{facts['stored_bytes']:,}")
    print()
    print_table(("part", "parameters", "bf16 bytes", "stored bytes"), [*rows, total])
    ratio = facts["bf16_bytes"] / facts["stored_bytes"]
    print(
        f"\n{facts['num_linears']} linears on a grid, {facts['num_scales']:,} scales, {ratio:.2f}x smaller once packed"
    )
    for name, reason in facts["formats"].items():
        print(f"format {name}: {'holds it' if reason is None else f'cannot hold it: {reason}'}")
