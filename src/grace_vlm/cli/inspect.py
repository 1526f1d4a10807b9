"""``grace inspect``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import emit_json, print_table

HELP = """Say what a folder is: its model, its grid, its bytes; or the fields of a recipe.

Example: grace inspect runs/demo/grace_w4"""


def inspect_path(
    path: Path = typer.Argument(..., help="Model folder, run folder, packed folder or checkpoint."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.formats.inspect import inspect_folder

    found = inspect_folder(path)
    if as_json:
        emit_json(found)
        return
    for key, value in found.items():
        if key != "linears":
            print(f"{key}: {value}")
    if found.get("linears"):
        rows = [(e["name"], f"{e['out_features']} x {e['in_features']}", e["scheme"]) for e in found["linears"]]
        print_table(("linear", "out x in", "scheme"), rows)
