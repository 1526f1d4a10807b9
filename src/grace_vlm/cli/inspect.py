"""``grace inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table

HELP = """Say what a folder is: its model, its grid, its bytes.

Example: grace inspect runs/demo/grace_w4"""


def inspect_path(
    path: Path = typer.Argument(..., help="Model folder, run folder, packed folder or checkpoint."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.formats.inspect import inspect_folder

    with ProgressBar("reading") as bar:
        found = inspect_folder(path, bar.update)
    if as_json:
        emit_json(found)
        return
    for key, value in found.items():
        # Of a model without a grid there is nothing to be said of one.
        if key != "linears" and value not in (None, {}) and (key != "bf16_linears" or found.get("linears")):
            print(f"{key}: {value}")
    if found.get("linears"):
        print_table(HEADER, [_row(linear) for linear in found["linears"]])
        stored, dense = found["weight_bytes"], found["bf16_bytes"]
        print(f"weights: {stored:,} bytes, {100 * stored / dense:.1f} % of the {dense:,} in BF16")


HEADER = ("linear", "out x in", "bits", "group", "bytes", "smallest scale", "largest scale", "negative", "clipped")


def _row(linear: dict[str, Any]) -> tuple[str, ...]:
    return (
        linear["name"],
        f"{linear['out_features']} x {linear['in_features']}",
        str(linear["bits"]),
        str(linear["group_size"]),
        f"{linear['bytes']:,}",
        f"{linear['scale_min']:.3g}",
        f"{linear['scale_max']:.3g}",
        f"{100 * linear['negative']:.0f} %",
        f"{100 * linear['clipped']:.2f} %",
    )
