"""``grace teacher cache``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table, say

if TYPE_CHECKING:
    from grace_vlm.train.cache_identity import Hidden
    from grace_vlm.train.config import Recipe

HELP = """Ask the teacher of a recipe about every row once and keep what it says, for runs without its body on the GPU.

Run it again to go on after an interruption, or after rows were added. Then train with model.teacher_cache=FOLDER.

Example: grace teacher cache recipes/qwen3_vl_2b_grace_w4g128.yaml --out runs/teacher-cache data.root=data"""


def cache_teacher(
    recipe: Path = typer.Argument(..., help="YAML recipe whose teacher and rows are meant."),
    overrides: list[str] = typer.Argument(None, help="key=value overrides, for example model.teacher_precision=fp8."),
    out: Path = typer.Option(None, "--out", help="Cache folder to make or to go on with."),
    hidden: str = typer.Option(
        "exact", "--hidden", help="How hidden states are kept: exact (BF16 on a GPU), bf16, or fp8 (half of it)."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print rows, tokens, bytes and hours, and stop."),
    gpu: str = typer.Option("h100", "--gpu", help="Whose hours --dry-run states: h100, h200, a100, l40s, rtx4090."),
    verify: bool = typer.Option(False, "--verify", help="Hash every byte of the cache in --out again, and stop."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.errors import ConfigError
    from grace_vlm.train.cache_identity import HIDDEN
    from grace_vlm.train.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    kind = next((name for name in HIDDEN if name == hidden), None)
    if kind is None:
        raise ConfigError(f"--hidden {hidden!r} is unknown; expected one of {', '.join(HIDDEN)}")
    if dry_run:
        _print_estimate(loaded, kind, gpu, as_json)
        return
    if out is None:
        raise ConfigError("--out is missing; give the cache folder to make, for example --out runs/teacher-cache")
    if verify:
        _verify(out, as_json)
        return
    from grace_vlm.train.cache_build import build_cache

    with ProgressBar("asking the teacher") as bar:
        report = build_cache(loaded, out, kind, notify=say, progress=bar.update)
    if as_json:
        emit_json({"cache": str(out), **asdict(report)})
        return
    bad = f", {report.num_bad} bad rows in {out / 'ledger.jsonl'}" if report.num_bad else ""
    print(
        f"{out}  ({report.num_entries:,} rows, {report.num_new:,} of them new, {report.num_tokens:,} supervised "
        f"tokens, {report.num_bytes:,} bytes{bad})"
    )


def _verify(out: Path, as_json: bool) -> None:
    from grace_vlm.train.cache_build import verify_cache

    with ProgressBar("verifying") as bar:
        report = verify_cache(out, bar.update)
    if as_json:
        emit_json({"cache": str(out), "verified": True, "num_entries": report.num_entries, "bytes": report.num_bytes})
    else:
        print(f"{out}: every byte of {report.num_entries:,} rows is what was written ({report.num_bytes:,} bytes)")


def _print_estimate(recipe: Recipe, hidden: Hidden, gpu: str, as_json: bool) -> None:
    from grace_vlm.cli.dry_run import check_gpu
    from grace_vlm.train.cache_estimate import estimate_cache

    check_gpu(gpu)
    with ProgressBar("reading rows") as bar:
        found = estimate_cache(recipe, hidden, bar.update)
    hours = found.work.hours(gpu)
    if as_json:
        facts = {name: value for name, value in vars(found).items() if name != "work"}
        emit_json({**facts, "hidden": hidden, "flop": found.work.flop, "gpu": gpu, "hours": hours})
        return
    rows = [
        ("rows", f"{found.num_rows:,}"),
        ("tokens", f"{found.tokens:,}"),
        ("supervised tokens", f"{found.supervised_tokens:,}"),
        ("bytes a supervised token", f"{found.token_bytes:,}"),
        ("bytes in all", f"{found.num_bytes:,}"),
        (f"hours on one {gpu}", f"{hours:,.2f}"),
    ]
    print_table(("cache", "estimated"), rows)
    print(f"\nfrom {found.num_sampled:,} of the rows, read as a build reads them; hidden states are kept as {hidden}")
