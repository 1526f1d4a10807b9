"""Worker processes that prepare rows ahead of the step: torch's DataLoader, fed with chunks of row numbers.

Results come in the order of the chunks, so a run does not depend on which worker was faster, and no more than
``PREFETCH_CHUNKS`` chunks a worker wait in memory. A worker that dies (killed, out of memory) ends the run with an
error within ``POLL_SECONDS``, one that hangs within ``HANG_SECONDS``; none of its rows is skipped.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import multiprocessing
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from grace_vlm.data.pictures import Picture
from grace_vlm.data.reader import Entry, Preparer
from grace_vlm.data.rows import Fault
from grace_vlm.errors import DataError, GraceError

Position = tuple[int, int]
"""(epoch, rows taken from its order)."""
Result = tuple[Position, Entry | Fault]
"""(position after the row, what it came to)."""
Chunk = list[tuple[Position, int]]
"""(position after the row, row number) of the rows that are prepared together."""

PREFETCH_CHUNKS = 4
POLL_SECONDS = 5
HANG_SECONDS = 120
_OF_WORKERS = re.compile("exited unexpectedly|is killed|timed out|ancdata")
"""In the text of a ``RuntimeError`` that says something of a worker, and not of its work."""


@dataclasses.dataclass(frozen=True)
class _Results:
    """Of a chunk, as a worker hands them over: the pixels of all pictures in one tensor.

    Each tensor that crosses costs a file descriptor, a connection and a map: those of 64 pictures took 45 ms of the
    training process, which has a step to launch (docs/log.md).

    Args:
        results: their pictures have no pixels. pixels: (n,), what they had, one after another. places: of each picture
            in order the first of its pixels and their shape; None of one that had none.
    """

    results: list[Result]
    pixels: torch.Tensor
    places: list[tuple[int, torch.Size] | None]

    @classmethod
    def of(cls, results: Sequence[Result]) -> _Results:
        parts: list[torch.Tensor] = []
        begins: dict[int, int] = {}  # by the tensor: a picture that two rows show crosses once
        places: list[tuple[int, torch.Size] | None] = []
        end = 0
        for picture in _pictures(results):
            if picture.pixels is None:
                places.append(None)
                continue
            if id(picture.pixels) not in begins:
                begins[id(picture.pixels)] = end
                parts.append(picture.pixels.flatten())
                end += picture.pixels.numel()
            places.append((begins[id(picture.pixels)], picture.pixels.shape))
        bare = [_with_pixels(result, itertools.repeat(None)) for result in results]
        return cls(bare, torch.cat(parts) if parts else torch.empty(0), places)

    def pin_memory(self) -> _Results:
        # DataLoader's own thread calls it, and the pixels leave pinned memory without a wait. A worker's tensor lies in
        # shared memory that this process has not touched: of 8 pictures the first touch and the copy took 60 ms of the
        # training thread's time (docs/log.md).
        return dataclasses.replace(self, pixels=self.pixels.pin_memory() if len(self.pixels) else self.pixels)

    def unpacked(self) -> Iterator[Result]:
        """The results with their pixels, views of the one tensor."""
        views = (
            None if place is None else self.pixels[place[0] : place[0] + place[1].numel()].view(place[1])
            for place in self.places
        )
        for result in self.results:
            yield _with_pixels(result, views)


def _pictures(results: Sequence[Result]) -> Iterator[Picture]:
    for _, found in results:
        if not isinstance(found, Fault):
            yield from found[2]


def _with_pixels(result: Result, pixels: Iterator[torch.Tensor | None]) -> Result:
    place, found = result
    if isinstance(found, Fault):
        return result
    row, sample, pictures = found
    return place, (row, sample, [dataclasses.replace(picture, pixels=next(pixels)) for picture in pictures])


def _results_of(preparer: Preparer, chunk: Chunk) -> list[Result]:
    found = preparer.prepare([index for _, index in chunk])
    return [(place, result) for (place, _), result in zip(chunk, found, strict=True)]


class _Prepared(Dataset[Any]):
    def __init__(self, preparer: Preparer) -> None:
        self.preparer = preparer

    def __getitem__(self, chunk: Chunk) -> _Results | GraceError:
        try:
            return _Results.of(_results_of(self.preparer, chunk))
        except GraceError as error:
            # A user's error crosses as a value: raised there, it would come back with the worker's traceback.
            return error


class _Chunks:
    """What DataLoader calls a sampler: it may be iterated, and that is all."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[Chunk]:
        return self.chunks


def _as_it_is(results: Any) -> Any:
    return results


def _one_thread(_: int) -> None:
    """A worker is one core's work; its kernels would otherwise start a thread for every core."""
    torch.set_num_threads(1)


class _Modules(ForkingPickler):
    """Notes the modules of what goes to a worker."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.names: set[str] = set()

    def reducer_override(self, item: Any) -> Any:
        # Pickled for a worker it would move to shared memory; this is for none.
        return (int, ()) if isinstance(item, torch.Tensor) else NotImplemented

    def persistent_id(self, item: Any) -> None:
        owner = item if hasattr(item, "__qualname__") else type(item)
        self.names.add(getattr(owner, "__module__", None) or "builtins")


def modules_of(item: Any) -> list[str]:
    """Names of the modules that unpickling it imports."""
    found = _Modules()
    found.dump(item)
    return sorted(found.names - {"builtins", "__main__", "__mp_main__"})


def start_server(preparer: Preparer) -> ForkServerContext:
    """Workers are forked from a process that has no CUDA context and no threads, and that has imported what they need
    once: they start one after another, and the modules of a processor alone take each of them seconds. It starts here
    and imports beside its caller; a second call finds it started, and what it did not import its workers do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules_of(preparer)])
    ensure_running()
    return context


def prepared(preparer: Preparer, chunks: Iterator[Chunk], num_workers: int) -> Iterator[Result]:
    """Each row of ``chunks`` with its position, in order; prepared by ``num_workers`` processes, or here when 0.

    Raises:
        DataError: a worker died or gave no answer for ``HANG_SECONDS``.
    """
    if num_workers == 0:
        for chunk in chunks:
            yield from _results_of(preparer, chunk)
        return
    context = start_server(preparer)
    with warnings.catch_warnings():
        # The number of workers is the recipe's; a machine with fewer cores is slower and not wrong.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        device = preparer.pictures.device
        loader: DataLoader[Any] = DataLoader(
            _Prepared(preparer),
            sampler=_Chunks(chunks),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=PREFETCH_CHUNKS,
            multiprocessing_context=context,
            worker_init_fn=_one_thread,
            pin_memory=device is not None and device.type == "cuda",
            timeout=POLL_SECONDS,
            # Its own, or it would draw from the run's, whose state is saved.
            generator=torch.Generator(),
        )
    waiting = iter(loader)
    while (results := _next_results(waiting)) is not None:
        yield from results.unpacked()


def _raised(results: _Results | GraceError) -> _Results:
    if isinstance(results, GraceError):
        raise results
    return results


def _next_results(waiting: Iterator[Any]) -> _Results | None:
    """The next chunk; None after the last.

    DataLoader looks for dead workers when its wait runs out, so it waits briefly and again.
    """
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        try:
            return _raised(next(waiting))
        except StopIteration:
            return None
        except (RuntimeError, ConnectionError, EOFError) as error:
            # A worker that dies while it hands a tensor over breaks the connection that carries it, or ends it.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, RuntimeError) and not _OF_WORKERS.search(reason):
                raise
            is_late = "timed out" in reason
            pinning = getattr(waiting, "_pin_memory_thread", None)
            if pinning is not None and not pinning.is_alive():
                # What broke a hand-over broke the thread that pins, and nothing would come any more.
                raise DataError(
                    "the loader's pinning thread died; no row was skipped, run again with --resume"
                ) from error
            if is_late and time.monotonic() < deadline:
                continue
            what = f"gave nothing for {HANG_SECONDS} seconds" if is_late else f"died: {reason}"
            raise DataError(f"a loader worker {what}; no row was skipped, run again with --resume") from error
