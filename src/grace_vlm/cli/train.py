"""``grace train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table, say

if TYPE_CHECKING:
    from grace_vlm.train.step import StepReport

HELP = """Train a recipe: sft, qat, kd or grace.

Example: grace train recipes/toy_grace_w4g128.yaml --out runs/grace optim.num_steps=200"""


def train_model(
    recipe: Path = typer.Argument(..., help="YAML recipe; see recipes/ and docs/recipes.md."),
    overrides: list[str] = typer.Argument(None, help="key=value overrides, for example optim.num_steps=200."),
    out: Path = typer.Option(..., "--out", help="Run folder to make."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest complete checkpoint."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Clear an existing run folder first."),
    plan_only: bool = typer.Option(False, "--plan", help="Print which linear gets which grid, and stop."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.train.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if plan_only:
        print_plan(loaded, as_json)
        return
    from grace_vlm.train.loop import train
    from grace_vlm.train.record import read_metrics

    with ProgressBar("training") as bar:

        def progress(report: StepReport, num_steps: int) -> None:
            bar.update(report.step + 1, num_steps, f"loss {report.loss:.3f}")

        final = train(loaded, out, resume=resume, overwrite=overwrite, notify=say, progress=progress)
    last = read_metrics(out / "metrics.jsonl")[-1]
    if as_json:
        emit_json({"model": str(final), "last_step": last})
    else:
        print(f"{final}  (step {last['step'] + 1}, loss {last['loss']:.4f})")


def print_plan(recipe: object, as_json: bool) -> None:
    """The table of ``--plan``."""
    from grace_vlm.data.rows import RowFile
    from grace_vlm.train.config import Recipe
    from grace_vlm.train.loop import open_student, plan_for

    assert isinstance(recipe, Recipe)
    path = Path(recipe.data.train)
    rows = RowFile(path, Path(recipe.data.root) if recipe.data.root else path.parent)
    plan = plan_for(recipe, open_student(recipe, rows))
    if as_json:
        emit_json(plan.to_json())
    else:
        print_table(("linear", "out x in", "scheme", "bf16 bytes", "stored bytes"), plan.table())
