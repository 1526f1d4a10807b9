"""``grace data check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table

HELP = """Read every row and decode every picture; list what is bad, convert nothing.

Example: grace data check runs/data/easy-vqa/train.jsonl"""

LISTED = 20
"""Bad rows that are printed."""


def check_data(
    file: Path = typer.Argument(..., help="Rows: JSON array or JSONL."),
    root: Path = typer.Option(None, "--root", help="Folder that image paths start from; default: the file's."),
    ledger: Path = typer.Option(None, "--ledger", help="Where to write all bad rows, a line of JSON each."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.data.check import check_file

    with ProgressBar("checking") as bar:
        report = check_file(file, root=root, ledger_path=ledger, progress=bar.update)
    if as_json:
        emit_json(asdict(report))
    else:
        for fault in report.faults[:LISTED]:
            print(f"row {fault.row} ({fault.id!r}): {fault.kind}: {fault.reason}")
        if len(report.faults) > LISTED:
            print(f"... and {len(report.faults) - LISTED} more; --ledger FILE has all")
        rows = [(kind, str(count)) for kind, count in sorted(report.counts.items())]
        print_table(("kind", "rows"), [*rows, ("good", str(report.num_good)), ("total", str(report.num_rows))])
        for name, count in sorted(report.conversions.items()):
            print(f"converted to upright RGB: {name} {count}")
    raise typer.Exit(3 if report.faults else 0)
