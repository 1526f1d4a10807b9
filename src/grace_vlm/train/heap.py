"""Python's garbage collector beside a loop that queues kernels.

A full collection goes through every object of the models, of Transformers and of the compiler: 0.1 to 0.4 s, now and
then, in which nothing is queued. What is there once the first steps have run stays until the end, so the collector need
not look at it again.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

WARM_STEPS = 3
"""After so many all is there: the first ones compile layers and record graphs."""


@contextlib.contextmanager
def quiet_heap() -> Iterator[Callable[[], None]]:
    """Gives what is called when a step has been queued; from ``WARM_STEPS`` on nothing that is there then is looked at,
    until the end. A program that has frozen its own keeps it so, and nothing is done here."""
    num_queued, is_ours = 0, False

    def queued() -> None:
        nonlocal num_queued, is_ours
        num_queued += 1
        if num_queued == WARM_STEPS and not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            is_ours = True

    try:
        yield queued
    finally:
        if is_ours:
            gc.unfreeze()
