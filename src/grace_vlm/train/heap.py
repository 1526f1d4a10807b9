"""Python's garbage collector beside a loop that queues kernels.

A full collection goes through every object of the models, of Transformers and of the compiler: 0.1 to 0.4 s, now and
then, in which nothing is queued. What is there once the first steps have run stays until the end, so the collector need
not look at it again.
"""

from __future__ import annotations

import gc

WARM_STEPS = 3
"""After which all is there: layers are compiled and graphs recorded by the first steps."""


def freeze_heap() -> None:
    """What is there now is not looked at again until ``thaw_heap``."""
    gc.collect()
    gc.freeze()


def thaw_heap() -> None:
    gc.unfreeze()
