"""``grace train``."""

from __future__ import annotations

import os
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
    out: Path = typer.Option(None, "--out", help="Run folder to make."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest complete checkpoint."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Clear an existing run folder first."),
    plan_only: bool = typer.Option(False, "--plan", help="Print which linear gets which grid, and stop."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print plan, memory, work and hours, and stop. Needs no GPU."
    ),
    fit: str = typer.Option(None, "--fit", help="Change the set-up to fit a GPU of this size, for example 48GB."),
    gpu: str = typer.Option("h100", "--gpu", help="Whose hours --dry-run states: h100, h200, a100, l40s, rtx4090."),
    row_tokens: int = typer.Option(None, "--row-tokens", help="--dry-run, --fit: default: one picture, 316 of text."),
    visual_tokens: int = typer.Option(
        None, "--visual-tokens", help="--dry-run, --fit: of a row; default: one picture."
    ),
    supervised_share: float = typer.Option(None, "--supervised-share", help="--dry-run, --fit: default: 266 tokens."),
    processes: int = typer.Option(
        None, "--processes", min=1, help="--dry-run, --fit: GPUs that share the run; default: as the launcher says."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.errors import ConfigError
    from grace_vlm.train.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if plan_only:
        print_plan(loaded, as_json)
        return
    if dry_run or fit is not None:
        from grace_vlm.cli.dry_run import Described, check_gpu, fitted, print_dry_run
        from grace_vlm.train.launcher import as_asked, asked_for

        check_gpu(gpu)
        asked = asked_for(os.environ)
        loaded = as_asked(loaded, asked)
        count = processes or int(os.environ.get("WORLD_SIZE", "1"))
        described = Described(loaded, row_tokens, visual_tokens, supervised_share, count)
        loaded = loaded if fit is None else fitted(loaded, described, fit, may_shard=asked is None)
        if dry_run:
            print_dry_run(loaded, described, gpu, as_json)
            return
    if out is None:
        raise ConfigError("--out is missing; give the run folder to make, for example --out runs/first")
    from grace_vlm.train.loop import train
    from grace_vlm.train.record import read_metrics

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun or accelerate started
    with ProgressBar("training", is_shown=is_first) as bar:

        def progress(report: StepReport, num_steps: int) -> None:
            bar.update(report.step + 1, num_steps, f"loss {report.loss:.3f}")

        final = train(loaded, out, resume=resume, overwrite=overwrite, notify=say, progress=progress)
    if not is_first:
        return
    last = read_metrics(out / "metrics.jsonl")[-1]
    if as_json:
        emit_json({"model": str(final), "last_step": last})
    else:
        print(f"{final}  (step {last['step'] + 1}, loss {last['loss']:.4f})")


def print_plan(recipe: object, as_json: bool) -> None:
    """The table of ``--plan``."""
    from grace_vlm.train.config import Recipe
    from grace_vlm.train.open import TOY, describe_student, open_rows, open_student, plan_for

    assert isinstance(recipe, Recipe)
    if recipe.model.student.startswith(TOY):
        student = open_student(recipe, open_rows(recipe))
        plan = plan_for(recipe, (student.model, student.adapter))
    else:
        plan = plan_for(recipe, describe_student(recipe))
    if as_json:
        emit_json(plan.to_json())
    else:
        print_table(("linear", "out x in", "scheme", "bf16 bytes", "stored bytes"), plan.table())
