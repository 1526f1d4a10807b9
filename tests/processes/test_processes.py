"""Several processes under ``torchrun`` (gloo, CPU): the run of one, exact resume, and no death that others wait for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.formats.weights import open_weights
from grace_vlm.train.config import load_recipe
from grace_vlm.train.loop import train
from grace_vlm.train.record import read_metrics

PLANTED = Path(__file__).with_name("planted.py")
EXIT_SECONDS = 30.0
RATES = {"optim__learning_rate": 1e-5, "optim__scale_learning_rate": 2e-4}
"""The published ones, at which FP32's roundings flip no code in 50 steps."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_rows(folder, 48)
    write_models(folder)
    return folder


@dataclass(frozen=True)
class Ended:
    """What a launch left."""

    code: int
    said: str
    at: float
    """When, in seconds of the clock."""

    @property
    def reasons(self) -> list[str]:
        """The error lines of the run's processes."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def recipe_of(world: Path, folder: Path, **overrides: Any) -> Path:
    """A recipe of four micro-batches a step."""
    path = folder / "recipe.yaml"
    tree = recipe_tree(world, data__accumulation=4, runtime__keep_checkpoints=9, **overrides)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def launch(
    num_processes: int,
    recipe: Path,
    out: Path,
    *more: str,
    plant: Sequence[object] = ("none", 0, 0),
    fp64: bool = False,
) -> Ended:
    """``torchrun`` of so many processes until all have ended."""
    words = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", PLANTED, *plant]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words), "train", str(recipe), "--out", str(out), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"PLANTED_FP64": "1"} if fp64 else {})},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout + done.stderr, time.time())


def masters_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Of all processes: rows end to end, or what each has all of, which must be the same bits."""
    files = sorted((out / "checkpoints" / f"step-{step:06d}").glob("masters*.safetensors"))
    parts = [load_file(file) for file in files]
    rows = {name: tensor.shape for name, tensor in open_weights(out / "final").items()}
    found = {}
    for name, first in parts[0].items():
        own = [part[name] for part in parts]
        if len(own) > 1 and first.shape == rows[name]:
            assert all(torch.equal(first, other) for other in own), name
            own = own[:1]
        found[name] = torch.cat(own)
        assert found[name].shape == rows[name]
    return found


def require_alike(one: Path, other: Path, step: int, bound: float) -> None:
    """Losses of every step and weights at ``step``, to a relative ``bound``."""
    for a, b in zip(read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl"), strict=True):
        for key in ("loss", "cross_entropy", "distillation", "relational", "gate_mean", "weight", "grad_norm"):
            assert abs(a[key] - b[key]) <= bound * abs(a[key]), (key, a, b)
        assert [a[key] for key in ("tokens", "supervised_tokens", "images")] == [
            b[key] for key in ("tokens", "supervised_tokens", "images")
        ]
    weights, others = masters_of(one, step), masters_of(other, step)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert float((weight - others[name]).norm()) <= bound * float(weight.norm()), name


@pytest.mark.parametrize(("fp64", "bound"), [(True, 1e-12), (False, 2e-6)])
def test_any_number_of_processes_makes_the_same_run(world: Path, tmp_path: Path, fp64: bool, bound: float) -> None:
    """Fifty steps: in FP64 at rates that move many codes, in FP32 at the published ones."""
    outs = {}
    for count in (1, 2, 4) if fp64 else (1, 2):
        settings = {"optim__num_steps": 50, "runtime__checkpoint_every_steps": 49, **({} if fp64 else RATES)}
        outs[count] = tmp_path / f"run-{count}"
        ended = launch(count, recipe_of(world, tmp_path, **settings), outs[count], fp64=fp64)
        assert ended.code == 0, ended.said
        assert ended.said.count("final  (step 50") == 1, "only the first process says what came out"
    assert not fp64 or sum(line["codes_flipped"] for line in read_metrics(outs[1] / "metrics.jsonl")) > 1000
    for count, out in outs.items():
        if count > 1:
            require_alike(outs[1], out, 49, bound)


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_was_stopped_ends_with_the_same_bytes(world: Path, tmp_path: Path) -> None:
    """One process of two is told by a scheduler; both stop with one step and go on, each from its place in the rows."""
    settings: dict[str, Any] = {"optim__num_steps": 10, "runtime__checkpoint_every_steps": 4}
    settings |= {"data__packing": True, "data__max_batch_tokens": 120, "data__max_tokens": 120}
    recipe = recipe_of(world, tmp_path, **settings)
    assert launch(2, recipe, tmp_path / "whole").code == 0
    stopped = launch(2, recipe, tmp_path / "run", plant=("usr1", 1, 4))
    assert stopped.reasons, stopped.said
    saved = tmp_path / "run" / "checkpoints" / "step-000007"  # asked in step 4, told with 5, known when 6 is queued
    assert set(stopped.reasons) == {f"error: stopped by SIGUSR1; {saved} is written: go on with --resume"}
    resumed = launch(2, recipe, tmp_path / "run", "--resume")
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


REASONS = {
    "nan": "cross_entropy is not finite for samples",
    "nan_gradient": "the gradient is not finite for samples",
    "out_of_memory": "CUDA out of memory",
    "crash": "ValueError: a bug",
    "kill": "has said nothing for 15 seconds: it was killed",
}


def strike(world: Path, tmp_path: Path, fault: str, num_processes: int, victim: int, step: int) -> None:
    """A fault in one process: all end soon, with one reason, and the last checkpoint is whole."""
    recipe = recipe_of(world, tmp_path, optim__num_steps=12, runtime__checkpoint_every_steps=2)
    ended = launch(num_processes, recipe, tmp_path / "run", plant=(fault, victim, step))
    assert ended.code != 0
    assert len(set(ended.reasons)) == 1, ended.said
    assert REASONS[fault] in ended.reasons[0], ended.said
    # One that was killed says nothing; one with a bug shows its traceback.
    assert len(ended.reasons) == num_processes - (fault in ("kill", "crash")), ended.said
    # Python that ends while the watch is in the store's C++ is aborted: SIGABRT instead of our exit code, now and then.
    assert "grace-watch" not in ended.said
    assert fault != "nan" or "threads at the end" in ended.said
    assert "SIGABRT" not in ended.said
    assert ended.at - float(re.findall(r"struck at ([\d.]+)", ended.said)[0]) < EXIT_SECONDS
    resumed = launch(num_processes, recipe, tmp_path / "run", "--resume")
    assert resumed.code == 0, resumed.said
    assert f"resumed from step-{step - step % 2:06d}" in resumed.said


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


def test_what_a_launcher_asks_for_and_is_not_there_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="asks for FSDP; expected plain data parallelism"):
        train(load_recipe(recipe_of(world, tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
