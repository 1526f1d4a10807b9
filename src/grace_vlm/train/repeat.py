"""A GPU that adds up in the same order every time, so that a run repeats bit for bit.

Three things of a step do not by themselves: the gradients of attention, which blocks of keys add to a query's in the
order in which they finish; library kernels that exist in a faster and in a repeatable form; and compiled layers, whose
reductions are cut as was fastest when they were compiled. A CPU repeats with the same number of threads anyway.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from grace_vlm.errors import ConfigError


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, torch takes algorithms that repeat. It must refuse those that do not: if it may warn of
    them instead, attention takes the one that does not repeat.

    cuBLAS reads its workspace from the environment when it is first used; what is set for it here stays set.

    Raises:
        ConfigError: an operation has no form that repeats.
    """
    if not wanted:
        yield
        return
    from torch._inductor import config as compiler

    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, chosen = memory.fill_uninitialized_memory, compiler.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing here is read before it is written, so memory need not be filled first.
    memory.fill_uninitialized_memory, compiler.deterministic = False, True
    try:
        yield
    except RuntimeError as error:
        if "determinis" not in str(error):
            raise
        reason = str(error).split(". ")[0]
        advice = "set runtime.deterministic=false"
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):
            advice = "set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the program starts"
        raise ConfigError(f"runtime.deterministic=true, and {reason}; {advice}") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory, compiler.deterministic = filled, chosen
