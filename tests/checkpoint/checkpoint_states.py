"""A small state whose every value follows from its step, and children that may be killed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from grace_vlm.checkpoint import TrainState


def make_state(step: int, size: int = 64) -> TrainState:
    """The state of ``step``: two of them are equal exactly if their steps are."""
    values = torch.arange(size, dtype=torch.float32) + step
    return TrainState(
        step=step,
        masters={"layer.weight": values.reshape(8, -1), "norm.weight": values.to(torch.bfloat16)},
        log_scales={"layer.weight": -values[:8]},
        optimizer_tensors={"layer.weight.exp_avg": values / 3, "layer.weight.exp_avg_sq": values * values},
        adaptive_weight={"beta": 1 / (step + 3), "updates": step},
        sampler={"epoch": 0, "cursor": 7 * step, "order": [3, 1, 2]},
        rng={"torch": f"{step:08x}" * 4},
        fingerprint={"config": f"{step:x}", "world_size": 1, "dtype": "bfloat16"},
    )


def assert_same_state(one: TrainState, other: TrainState) -> None:
    """Equal field for field, tensors bit for bit."""
    for name, value in vars(one).items():
        found = getattr(other, name)
        if value and isinstance(value, dict) and isinstance(next(iter(value.values())), torch.Tensor):
            assert value.keys() == found.keys(), name
            for key, tensor in value.items():
                assert tensor.dtype == found[key].dtype, key
                assert torch.equal(tensor, found[key]), key
        else:
            assert value == found, name


def in_child(work: Callable[[], int | None]) -> int:
    """Run ``work`` in a forked process and wait; its return value (None: 0) is the exit status, 70 if it raised."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fail_at(k: int, root: Path, failure: int) -> Callable[[], bool]:
    """In this (forked) process, the k-th system call on ``root`` fails: errno ``failure``, or death if 0.

    Python announces opens, renames, deletions, mkdir, chmod to audit hooks just before they happen; fsync is wrapped,
    and counts twice, before and after. Returns: was the k-th call reached?
    """
    count = 0
    real_fsync = os.fsync

    def step(name: str) -> None:
        nonlocal count
        count += 1
        if count == k:
            if failure == 0:
                os._exit(9)
            raise OSError(failure, os.strerror(failure), name)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
            name = args[0]
            if isinstance(name, str | os.PathLike) and os.fspath(name).startswith(str(root)):
                step(os.fspath(name))

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        step(name)
        real_fsync(descriptor)
        step(name)

    os.fsync = fsync
    sys.addaudithook(hook)
    return lambda: count >= k


def leftovers(folder: Path) -> list[str]:
    """Every name below ``folder`` that only a writer in progress may have."""
    return [path.name for path in folder.rglob(".*")]
