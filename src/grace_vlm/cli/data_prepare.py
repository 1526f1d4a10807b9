"""``grace data prepare``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from grace_vlm.cli.output import emit_json, print_table, say

HELP = """Make a data set of real pictures and questions from an installed package or our generators.

Example: grace data prepare easy-vqa runs/data/easy-vqa"""


def prepare_data(
    source: str = typer.Argument(..., help="easy-vqa, scenes, mix (both), or toy (for the shipped bases)."),
    out: Path = typer.Argument(..., help="Folder to make: images/ and train, val, test .jsonl."),
    seed: int = typer.Option(0, "--seed", help="Same seed, same bytes."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing folder."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.data.sources.prepare import prepare

    say(f"preparing {source}")
    info = prepare(source, out, seed=seed, overwrite=overwrite)
    if as_json:
        emit_json({**asdict(info), "out": str(info.out)})
        return
    rows = [(split, str(info.num_images[split]), str(info.num_rows[split])) for split in info.num_rows]
    print_table(("split", "pictures", "questions"), rows)
