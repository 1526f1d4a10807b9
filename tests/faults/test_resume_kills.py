"""A run that is killed at any instant and resumed ends with the bytes of a run that was not.

Compared are the sha256 of every tensor of ``final/`` and the loss log, whose floats JSON keeps exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from toy_run import write_models, write_rows

NUM_STEPS = 8


class ForkServer:
    """Training runs as forks of one warm process."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("fork_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=script.parent
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, out: Path) -> int:
        """Start or resume a run; returns its pid."""
        assert self.process.stdin is not None
        job = {"folder": str(folder), "out": str(out), "resume": out.exists()}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Exit code of the run; -9 after a kill."""
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    one = ForkServer()
    yield one
    one.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> dict[str, Any]:
    """Models, rows, and the outcome and duration of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("kills")
    write_rows(folder)
    write_models(folder)
    started = time.monotonic()
    server.start(folder, folder / "undisturbed")
    assert server.wait() == 0
    seconds = time.monotonic() - started
    return {"folder": folder, "seconds": seconds, "outcome": outcome(folder / "undisturbed")}


def outcome(run: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """({tensor: sha256}, loss log without the clock)."""
    tensors = {}
    for file in sorted((run / "final").rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                value = opened.get_tensor(name)
                tensors[f"{file.name}:{name}"] = hashlib.sha256(
                    value.view(-1).contiguous().view(dtype_bytes()).numpy()
                ).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"]
    return tensors, lines


def dtype_bytes() -> Any:
    import torch

    return torch.uint8


def partials(run: Path) -> list[Path]:
    checkpoints = run / "checkpoints"
    found = list(run.glob(".partial-*"))
    return found + (list(checkpoints.glob(".partial-*")) if checkpoints.is_dir() else [])


def kill_somewhere(pid: int, run: Path, rng: random.Random, seconds: float, inside_save: bool) -> bool:
    """SIGKILL at a random instant, or once a save has been staged; True if a save was cut."""
    time.sleep(rng.uniform(0, seconds))
    if inside_save:
        deadline = time.monotonic() + seconds
        while not partials(run) and time.monotonic() < deadline:
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.004))
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return bool(partials(run))


def run_kills(
    server: ForkServer, world: dict[str, Any], tmp_path: Path, num_kills: int, num_cut_saves: int, seed: int
) -> None:
    """Kill and resume ``num_kills`` runs, and more of them (at most four times as many) until ``num_cut_saves`` kills
    fell inside a save: on a busy machine an aimed kill often comes too late."""
    rng = random.Random(seed)
    number = cut_saves = 0
    while number < num_kills or (cut_saves < num_cut_saves and number < 4 * num_kills):
        run = tmp_path / f"run{number}"
        is_aimed = number % 2 == 0 or number >= num_kills
        pid = server.start(world["folder"], run)
        cut_saves += kill_somewhere(pid, run, rng, world["seconds"] * 0.8, is_aimed)
        assert server.wait() in (-9, 0)
        server.start(world["folder"], run)
        assert server.wait() == 0
        tensors, lines = outcome(run)
        assert tensors == world["outcome"][0], f"kill {number}"
        assert lines == world["outcome"][1], f"kill {number}"
        assert partials(run) == [], "a stale partial was left"
        number += 1
    assert cut_saves >= num_cut_saves


def test_undisturbed_run_trains(world: dict[str, Any]) -> None:
    tensors, lines = world["outcome"]
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert any(line["codes_flipped"] for line in lines)
    assert any(name.endswith(".codes") for name in tensors)


def test_same_seed_same_bytes(server: ForkServer, world: dict[str, Any], tmp_path: Path) -> None:
    server.start(world["folder"], tmp_path / "again")
    assert server.wait() == 0
    assert outcome(tmp_path / "again") == world["outcome"]


def test_eight_kills(server: ForkServer, world: dict[str, Any], tmp_path: Path) -> None:
    run_kills(server, world, tmp_path, 8, num_cut_saves=2, seed=1)


@pytest.mark.soak
def test_forty_kills(server: ForkServer, world: dict[str, Any], tmp_path: Path) -> None:
    run_kills(server, world, tmp_path, 40, num_cut_saves=12, seed=2)
