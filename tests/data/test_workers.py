"""Worker processes change nothing but the time: the same batches, the same ledger, and an error when one dies."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loader import BAD, encoder, make_reader, same, write_rows

from grace_vlm.data.encode import Encoder
from grace_vlm.data.loader import TrainLoader
from grace_vlm.data.reader import Entry
from grace_vlm.data.rows import Fault
from grace_vlm.data.workers import _next_results, _Results, modules_of
from grace_vlm.errors import ConfigError, DataError

__all__ = ["encoder"]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_and_ledger_are_those_of_no_workers(tmp_path: Path, encoder: Encoder, workers: int) -> None:
    loaders = []
    for number in (0, workers):
        path = write_rows(tmp_path / str(number), BAD)
        loaders.append(TrainLoader(make_reader(path, encoder), 4, seed=5, num_workers=number))
    for _ in range(14):  # more than two epochs
        left, right = loaders[0].next(), loaders[1].next()
        assert same(left, right)
        assert loaders[0].state_dict() == loaders[1].state_dict()
    ledgers = [(tmp_path / str(number) / "ledger.jsonl").read_bytes() for number in (0, workers)]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0].count(b"\n") == len(BAD)
    loaders[1].close()


def test_pixels_cross_as_one_tensor(tmp_path: Path, encoder: Encoder) -> None:
    """Each once, beside rows without a picture, bad rows and pictures whose pixels nobody needs."""
    preparer = make_reader(write_rows(tmp_path, BAD), encoder).preparer
    found: list[Entry | Fault] = preparer.prepare(range(len(preparer.rows)))
    row, sample, pictures = next(entry for entry in found if not isinstance(entry, Fault) and entry[2])
    bare = [dataclasses.replace(picture, pixels=None) for picture in pictures]
    entries: list[Entry | Fault] = [*found, (row, sample, []), (row, sample, bare), (row, sample, pictures)]
    given = [((0, number), entry) for number, entry in enumerate(entries)]
    packed = _Results.of(given)
    assert any(isinstance(entry, Fault) for entry in found)
    distinct = {id(picture.pixels): picture.pixels for entry in entries if not isinstance(entry, Fault)
                for picture in entry[2] if picture.pixels is not None}  # fmt: skip
    assert packed.pixels.numel() == sum(pixels.numel() for pixels in distinct.values())
    assert all(picture.pixels is None for _, entry in packed.results if not isinstance(entry, Fault)
               for picture in entry[2])  # fmt: skip
    back = list(packed.unpacked())
    assert [place for place, _ in back] == [place for place, _ in given]
    for (_, one), (_, other) in zip(given, back, strict=True):
        if isinstance(one, Fault) or isinstance(other, Fault):
            assert one is other
            continue
        assert one[:2] == other[:2]
        for left, right in zip(one[2], other[2], strict=True):
            assert dataclasses.replace(left, pixels=None) == dataclasses.replace(right, pixels=None)
            assert (left.pixels is None) == (right.pixels is None)
            assert left.pixels is None or torch.equal(left.pixels, right.pixels)  # type: ignore[arg-type]


def test_a_killed_worker_ends_the_run_with_an_error(tmp_path: Path, encoder: Encoder) -> None:
    loader = TrainLoader(make_reader(write_rows(tmp_path), encoder), 2, seed=5, num_workers=1)
    loader.next()
    workers = [p for p in multiprocessing.active_children() if p.name.startswith("ForkServerProcess")]
    assert workers
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    def go_on() -> None:
        for _ in range(30):
            loader.next()

    with pytest.raises(DataError, match=r"a loader worker died: .*; no row was skipped"):
        go_on()


def test_a_worker_is_born_with_what_it_needs(tmp_path: Path, encoder: Encoder) -> None:
    """Imported in each worker, one after another, a processor's modules are seconds a worker."""
    reader = make_reader(write_rows(tmp_path), encoder)
    needed = modules_of(reader.preparer)
    assert type(encoder.processor).__module__ in needed
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # of a test before, with another processor
    said = tmp_path / "said"
    code = f"import pathlib, sys; pathlib.Path({str(said)!r}).write_text(repr(set({needed}) - set(sys.modules)))"
    TrainLoader(reader, 2, seed=0, num_workers=1)
    worker = multiprocessing.get_context("forkserver").Process(target=exec, args=(code,))
    worker.start()
    worker.join(60)
    assert said.read_text() == "set()"


def broken_off(error: Exception) -> Iterator[Any]:
    raise error
    yield


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EOFError(), "EOFError"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
        (RuntimeError("received 0 items of ancdata"), "received 0 items of ancdata"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly\nmore"), ".* exited unexpectedly"),
    ],
)
def test_a_worker_may_break_off_at_any_byte(error: Exception, reason: str) -> None:
    """What is seen of a kill depends on what the worker was handing over."""
    with pytest.raises(DataError, match=rf"a loader worker died: {reason}; no row was skipped"):
        _next_results(broken_off(error))


def test_an_error_that_is_no_death_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="a shape that lies"):
        _next_results(broken_off(RuntimeError("a shape that lies")))


def test_a_users_error_in_a_worker_is_the_line_it_is_without_workers(tmp_path: Path, encoder: Encoder) -> None:
    """And the run's random state is not drawn from."""
    path = write_rows(tmp_path)
    lines = []
    for workers in (0, 1):
        reader = make_reader(path, encoder)
        reader.preparer.encoder = Unusable()
        before = torch.get_rng_state()
        with pytest.raises(ConfigError) as caught:
            TrainLoader(reader, 2, seed=5, num_workers=workers).next()
        lines.append(str(caught.value))
        assert torch.equal(torch.get_rng_state(), before)
    assert lines == ["this template cannot be used"] * 2


class Unusable:
    """An encoder whose chat template is refused."""

    def encode(self, row: object, grids: object) -> object:
        raise ConfigError("this template cannot be used")
