"""``grace`` as one of several processes, with a fault planted in one of them: what ``torchrun`` is given by the tests.

    planted.py FAULT RANK STEP grace's arguments...

The fault strikes process RANK where it launches step STEP. ``none`` strikes nobody.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grace_vlm.cli.main import main
from grace_vlm.train import loop
from grace_vlm.train.step import Stepper

torch.set_num_threads(int(os.environ.get("PLANTED_THREADS", "1")))


def kill(stepper: Stepper) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(stepper: Stepper) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def crash(stepper: Stepper) -> None:
    raise ValueError("a bug")


def nan(stepper: Stepper) -> None:
    """A master of this process only, so that its own loss is not a number."""
    leaf = next(
        p for name, p in stepper.student.model.named_parameters() if name.endswith("language_model.norm.weight")
    )
    leaf.data.fill_(float("nan"))


def nan_gradient(stepper: Stepper) -> None:
    leaf = next(
        p for name, p in stepper.student.model.named_parameters() if name.endswith("language_model.norm.weight")
    )
    stepper.masters.sums_of(stepper.student.model)._sums[leaf].add(torch.full_like(leaf, float("nan")))


def freeze(stepper: Stepper) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def ask(number: int) -> Callable[[Stepper], None]:
    return lambda stepper: os.kill(os.getpid(), number)


FAULTS: dict[str, Callable[[Stepper], None]] = {
    "none": lambda stepper: None,
    "kill": kill,
    "out_of_memory": out_of_memory,
    "crash": crash,
    "nan": nan,
    "nan_gradient": nan_gradient,
    "freeze": freeze,
    "term": ask(signal.SIGTERM),
    "usr1": ask(signal.SIGUSR1),
}


def plant(fault: str, rank: int, at: int) -> None:
    launch = Stepper.launch

    def planted(self: Stepper, step: int, *arguments: Any) -> Any:
        if step == at and int(os.environ.get("RANK", "0")) == rank:
            print(f"struck at {time.time()}", flush=True)
            FAULTS[fault](self)
        return launch(self, step, *arguments)

    Stepper.launch = planted  # type: ignore[method-assign]


def compute_in_fp64() -> None:
    """Models in FP64, on which sums in another order differ by 1e-16 and not by 1e-7."""
    open_student, open_teacher = loop.open_student, loop.open_teacher

    def student(*arguments: Any) -> Any:
        loaded = open_student(*arguments)
        loaded.model.double()
        return loaded

    def teacher(recipe: Any, student: Any, cut: Any) -> Any:
        loaded = open_teacher(recipe, student)
        assert loaded is not None
        loaded.model.double()
        if cut is not None:
            cut(loaded.model, torch.device("cpu"))
        return loaded

    loop.open_student, loop.open_teacher = student, teacher  # type: ignore[assignment]


def tell_threads() -> None:
    """Of gloo, which must be gone before the interpreter is: they could abort it."""
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    if left := [name for name in names if "gloo" in name]:
        print(f"{len(left)} threads of gloo are left", flush=True)


if __name__ == "__main__":
    atexit.register(tell_threads)  # the first to be registered is the last that is called
    if os.environ.get("PLANTED_FP64"):
        compute_in_fp64()
    plant(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.argv = ["grace", *sys.argv[4:]]
    try:
        main()
    finally:
        print(f"threads at the end: {[thread.name for thread in threading.enumerate()]}", flush=True)
