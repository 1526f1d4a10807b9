"""The folder of a run: whether it may be used, what is in it, and what a kill left there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from grace_vlm.checkpoint.atomic import sweep_partials
from grace_vlm.errors import CheckpointError
from grace_vlm.train.config import Recipe, dump_recipe

Notify = Callable[[str], None]


def ledger_name(index: int) -> str:
    """Of a process's own file of bad rows: each sees its share of the rows."""
    return "ledger.jsonl" if index == 0 else f"ledger-{index}.jsonl"


def prepare_run_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Make ``out`` ready: refuse an existing run, or clear it if ``overwrite``."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; expected a folder for the run")
    if (out / "config.json").is_file() and not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is a model folder and no run; it is left as it is: choose another --out")
    if resume:
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists; pass --resume to go on, --overwrite to start again, or another --out")
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is no run folder (no config.yaml); it is not overwritten: choose another --out")
    shutil.rmtree(out)


def is_complete(recipe: Recipe, out: Path, resume: bool, notify: Notify) -> bool:
    """Whether there is nothing left to do in a folder; else what a kill left in it is cleared."""
    if resume and (out / "final" / "manifest.json").is_file():
        stored = (out / "config.yaml").read_text(encoding="utf-8")
        if stored != dump_recipe(recipe):
            raise CheckpointError(f"{out} is a finished run of another recipe; choose another --out or --overwrite")
        return True
    for stale in (*sweep_partials(out), *sweep_partials(out / "checkpoints")):
        notify(f"removed {stale.name}, left by an interrupted save")
    return False


def require_same_recipe(out: Path, recipe: Recipe) -> None:
    """``CheckpointError`` that names every key in which the recipe of a folder's run is another one."""
    path = out / "config.yaml"
    if not path.is_file():
        return
    before, now = (_flat(yaml.safe_load(text)) for text in (path.read_text(encoding="utf-8"), dump_recipe(recipe)))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if keys:
        said = "; ".join(f"{key}: {before.get(key)} then, {now.get(key)} now" for key in keys)
        raise CheckpointError(f"{out} is a run of another recipe ({said}); restore these settings or start a new run")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """section.key -> value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    dot = prefix + "." if prefix else ""
    return {name: value for key, part in tree.items() for name, value in _flat(part, f"{dot}{key}").items()}
