"""``torchrun`` of toy runs (gloo, CPU), and what two runs are compared by."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from toy_run import recipe_tree

from grace_vlm.formats.weights import open_weights
from grace_vlm.train.record import read_metrics

EXIT_SECONDS = 30.0
FP64_RUN = {"optim__num_steps": 50, "runtime__checkpoint_every_steps": 49}
"""At ``toy_run``'s rates, which move many codes."""
EVERYTHING = {"runtime__sharding": "parameters", "model__teacher_sharding": "parameters"}
PLANTED = Path(__file__).with_name("planted.py")
RATES = {"optim__learning_rate": 1e-5, "optim__scale_learning_rate": 2e-4}
"""The published ones, at which FP32's roundings flip no code in 50 steps."""


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
    tree = recipe_tree(world, **{"data__accumulation": 4, "runtime__keep_checkpoints": 9, **overrides})
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


REASONS = {
    "nan": "cross_entropy is not finite for samples",
    "nan_gradient": "the gradient is not finite for samples",
    "out_of_memory": "CUDA out of memory",
    "crash": "ValueError: a bug",
    "kill": "has said nothing for 15 seconds: it was killed",
}


def strike(
    world: Path, tmp_path: Path, fault: str, num_processes: int, victim: int, step: int, **overrides: Any
) -> None:
    """A fault in one process: all end soon, with one reason, and the last checkpoint is whole."""
    recipe = recipe_of(world, tmp_path, optim__num_steps=12, runtime__checkpoint_every_steps=2, **overrides)
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
