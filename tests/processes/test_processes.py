"""Several processes under ``torchrun`` (gloo, CPU): the run of one, exact resume, and no death that others wait for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from launched import (
    EVERYTHING,
    FP64_RUN,
    RATES,
    REASONS,
    contents,
    launch,
    masters_of,
    recipe_of,
    require_alike,
    strike,
)

from grace_vlm.train.record import read_metrics


@pytest.mark.parametrize(("fp64", "bound"), [(True, 1e-12), (False, 2e-6)])
def test_any_number_of_processes_makes_the_same_run(world: Path, tmp_path: Path, fp64: bool, bound: float) -> None:
    """Fifty steps: in FP64 at rates that move many codes, in FP32 at the published ones."""
    runs: dict[str, tuple[int, dict[str, Any]]] = {"1": (1, {}), "2": (2, {})}
    if fp64:
        runs |= {"4": (4, {}), "2 with everything shared out": (2, EVERYTHING)}
    for name, (count, overrides) in runs.items():
        recipe = recipe_of(world, tmp_path, **FP64_RUN, **({} if fp64 else RATES), **overrides)
        ended = launch(count, recipe, tmp_path / name, fp64=fp64)
        assert ended.code == 0, ended.said
        assert ended.said.count("final  (step 50") == 1, "only the first process says what came out"
        assert "threads of gloo" not in ended.said
        if count > 1:
            require_alike(tmp_path / "1", tmp_path / name, 49, bound)
    assert not fp64 or sum(line["codes_flipped"] for line in read_metrics(tmp_path / "1" / "metrics.jsonl")) > 1000


def test_each_process_keeps_and_writes_its_share(world: Path, tmp_path: Path) -> None:
    settings = {"optim__num_steps": 3, "runtime__checkpoint_every_steps": 2}
    assert launch(4, recipe_of(world, tmp_path, **settings), tmp_path / "run").code == 0
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    for field in ("masters", "log_scales", "optimizer_tensors"):
        sizes = [path.stat().st_size for path in sorted(folder.glob(f"{field}-*-of-00004.safetensors"))]
        assert len(sizes) == 4
        assert max(sizes) < 1.02 * min(sizes), field
    whole = sum(tensor.numel() * 4 for tensor in masters_of(tmp_path / "run", 2).values())
    assert (folder / "masters-00001-of-00004.safetensors").stat().st_size < 0.3 * whole


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(world: Path, tmp_path: Path, count: int) -> None:
    """One process is told by a scheduler; all stop with one step and go on, each from its place in the rows."""
    settings: dict[str, Any] = {"optim__num_steps": 10, "runtime__checkpoint_every_steps": 4}
    settings |= {"data__packing": True, "data__max_batch_tokens": 120, "data__max_tokens": 120}
    recipe = recipe_of(world, tmp_path, **settings)
    assert launch(count, recipe, tmp_path / "whole").code == 0
    stopped = launch(count, recipe, tmp_path / "run", plant=("usr1", 1, 4))
    assert stopped.reasons, stopped.said
    saved = tmp_path / "run" / "checkpoints" / "step-000007"  # asked in step 4, told with 5, known when 6 is queued
    assert set(stopped.reasons) == {f"error: stopped by SIGUSR1; {saved} is written: go on with --resume"}
    resumed = launch(count, recipe, tmp_path / "run", "--resume")
    assert resumed.code == 0, resumed.said
    assert resumed.said.count("resumed from step-000007") == 1
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "whole" / "final")


def test_another_number_of_processes_goes_on_and_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"optim__num_steps": 8, "runtime__checkpoint_every_steps": 4}
    recipe = recipe_of(world, tmp_path, **settings)
    assert launch(1, recipe, tmp_path / "whole", fp64=True).code == 0
    assert launch(2, recipe, tmp_path / "run", plant=("term", 0, 2), fp64=True).code != 0
    monkeypatch.setenv("PLANTED_THREADS", "2")  # torchrun gives several processes one thread each, and one all
    resumed = launch(1, recipe, tmp_path / "run", "--resume", fp64=True)
    assert resumed.code == 0, resumed.said
    assert "which 2 processes wrote and 1 read: not bit-exact" in resumed.said
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], rel=1e-12)


@pytest.mark.parametrize("fault", ["nan", "kill"])
def test_a_fault_of_one_ends_all_with_one_reason(world: Path, tmp_path: Path, fault: str) -> None:
    strike(world, tmp_path, fault, 2, 1, 5)


FAULTS = [
    (fault, count, victim, step)
    for step, (fault, count, victim) in enumerate(
        [
            *((fault, 2, victim) for fault in REASONS for victim in (0, 1)),
            *((fault, 4, victim) for fault in REASONS for victim in (0, 3)),
        ]
    )
    for step in [2 + step % 7]
]
FEWER = int(os.environ.get("GRACE_FAULTS", len(FAULTS)))
"""CI has no time for all: so many, evenly from all kinds."""


@pytest.mark.soak
@pytest.mark.parametrize(("fault", "count", "victim", "step"), FAULTS[:: -(-len(FAULTS) // FEWER)])
def test_twenty_faults(world: Path, tmp_path: Path, fault: str, count: int, victim: int, step: int) -> None:
    strike(world, tmp_path, fault, count, victim, step)


def test_a_folder_that_is_refused_is_refused_by_all(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    ended = launch(2, recipe_of(world, tmp_path), tmp_path / "run")
    assert set(ended.reasons) == {
        f"error: {tmp_path / 'run'} exists; pass --resume to go on, --overwrite to start again, or another --out"
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_bad_row_that_another_process_met_counts(world: Path, tmp_path: Path) -> None:
    """Two bad rows in a budget of one, whichever processes meet them."""
    lines = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    for number in (7, 30):
        lines[number] = json.dumps({**json.loads(lines[number]), "image": "images/missing.png"})
    (world / "bad.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = recipe_of(world, tmp_path, data__train=str(world / "bad.jsonl"), data__max_bad_fraction=1 / 48)
    ended = launch(2, recipe, tmp_path / "run")
    assert ended.code != 0
    assert ended.reasons, ended.said
    assert all("2 bad rows of 48" in reason and "over the budget of 1" in reason for reason in ended.reasons)


def test_micro_batches_that_cannot_be_shared_out_are_refused(world: Path, tmp_path: Path) -> None:
    ended = launch(3, recipe_of(world, tmp_path), tmp_path / "run")
    assert set(ended.reasons) == {
        "error: data.accumulation is 4 micro-batches a step for 3 processes; expected a multiple, so that every "
        "process has as many"
    }
    assert not (tmp_path / "run").exists()
