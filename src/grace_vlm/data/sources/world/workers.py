"""Drawing over processes. A job's result hangs on its part, split, units and the seed alone, never on who draws it."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from grace_vlm.data.sources.questions import Question
from grace_vlm.data.sources.world.drawn import Source
from grace_vlm.data.sources.world.plan import Job
from grace_vlm.errors import OtherProcessError

SourceMaker = Callable[[], Source]
"""Makes a part's source; pickled by its name and arguments (``functools.partial``)."""


@dataclass(frozen=True)
class Filed:
    """What was drawn, its pictures in files below the mix's folder. ``digests``: SHA-256 of each picture, or of the
    text where there is none."""

    job: Job
    images: tuple[str, ...]
    digests: tuple[str, ...]
    questions: tuple[Question, ...]
    caption: str


def run_jobs(
    jobs: list[Job], makers: Mapping[str, SourceMaker], folder: Path, num_workers: int
) -> Iterator[list[Filed]]:
    """Results in the order of the jobs; one process draws itself, several are started for it.

    Raises:
        OtherProcessError: a process died.
    """
    if num_workers == 1:
        draw = _Drawer(makers, folder)
        yield from map(draw, jobs)
        return
    # Not forked from here, where a progress bar has a thread; and what a process imports is small.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=(makers, folder))
    try:
        yield from _in_order(pool, jobs, 4 * num_workers)
    except BrokenProcessPool as error:
        raise OtherProcessError(
            "a process that draws pictures died, perhaps for want of memory; give fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, jobs: Iterable[Job], num_ahead: int) -> Iterator[list[Filed]]:
    remaining = iter(jobs)
    waiting: list[Future[list[Filed]]] = [pool.submit(_draw, job) for job in islice(remaining, num_ahead)]
    while waiting:
        result = waiting.pop(0).result()
        waiting += [pool.submit(_draw, job) for job in islice(remaining, 1)]
        yield result


class _Drawer:
    """Draws jobs in one process; a part's source is made when its first job comes."""

    def __init__(self, makers: Mapping[str, SourceMaker], folder: Path) -> None:
        self._makers, self._folder = makers, folder
        self._sources: dict[str, Source] = {}

    def __call__(self, job: Job) -> list[Filed]:
        if job.part not in self._sources:
            self._sources[job.part] = self._makers[job.part]()
        return [filed for number in range(job.start, job.stop) for filed in self._unit(job, number)]

    def _unit(self, job: Job, number: int) -> Iterator[Filed]:
        for place, drawn in enumerate(self._sources[job.part].unit(job.split, number)):
            names, digests = [], []
            for index, data in enumerate(drawn.images):
                parts = [job.split, f"{number:05d}", *([str(place)] if job.part == "suite" else [])]
                stem = "-".join([*parts, *([str(index)] if len(drawn.images) > 1 else [])])
                name = f"images/{job.part}/{stem}{drawn.suffix}"
                (self._folder / name).write_bytes(data)
                names.append(name)
                digests.append(hashlib.sha256(data).hexdigest())
            if not names:
                digests = [hashlib.sha256("\n".join(q.text for q in drawn.questions).encode()).hexdigest()]
            yield Filed(job, tuple(names), tuple(digests), drawn.questions, drawn.caption)


_drawers: list[_Drawer] = []
"""Of a started process: one."""


def _start(makers: Mapping[str, SourceMaker], folder: Path) -> None:
    _drawers.append(_Drawer(makers, folder))


def _draw(job: Job) -> list[Filed]:
    return _drawers[0](job)
