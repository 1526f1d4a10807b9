"""What reaches the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from grace_vlm.errors import printable

LINE_SECONDS = 30.0
"""Between two lines about how far a command is, where no bar can be shown."""


def fail(message: str, exit_code: int) -> NoReturn:
    """Print one ``error:`` line and end the process."""
    say(f"error: {' '.join(message.split())}")
    sys.exit(exit_code)


def say(message: str) -> None:
    """A message to a person: standard error, so that ``--json`` keeps standard output to itself."""
    sys.stderr.write(f"{message}\n")  # in one piece: processes of one run share the terminal
    sys.stderr.flush()


def emit_json(document: Any) -> None:
    """The one JSON document of ``--json``."""
    print(json.dumps(document, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table on standard output: words stand on the left of their column, numbers on the right."""
    table = [list(header), *[[printable(cell) for cell in row] for row in rows]]
    columns = list(zip(*table, strict=True))
    widths = [max(map(len, column)) for column in columns]
    put = [str.rjust if _is_of_numbers(column[1:]) else str.ljust for column in columns]
    for number, line in enumerate(table):
        print("  ".join(one(cell, width) for one, cell, width in zip(put, line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _is_of_numbers(cells: Sequence[str]) -> bool:
    """Whether a column's cells are numbers, with their signs and units, where they are anything."""
    filled = [cell for cell in cells if cell not in ("", "-", "nan")]
    return bool(filled) and all(re.match(r"[-+]?[0-9]", cell) for cell in filled)


def show(line: str) -> None:
    """One line of a result; what strangers wrote in it cannot break it or colour the terminal."""
    print(printable(line))


class ProgressBar:
    """How far a command is, on standard error: a Rich bar, or a line now and then where that is no terminal; nothing
    where it is not to be shown."""

    def __init__(self, description: str, is_shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (is_shown and console.is_terminal),
        )
        self._task = self._progress.add_task(description, total=None)
        self._lines = _Lines(description) if is_shown and not console.is_terminal else None

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Move to ``done`` of ``total``."""
        if self._lines is not None:
            self._lines.update(done, total, note)
        fields = {"description": note} if note else {}
        self._progress.update(self._task, completed=done, total=total, **fields)  # type: ignore[arg-type]


class _Lines:
    """``answering 1,280 of 6,000, 4 min left``, at most every ``LINE_SECONDS`` and not before."""

    def __init__(self, description: str) -> None:
        self._description, self._said_at = description, time.monotonic()
        self._first: tuple[float, int] | None = None
        """When the first number came, and which: a job that goes on does not begin at 0."""

    def update(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = (now, done)
        if now - self._said_at < LINE_SECONDS or done >= total:
            return
        self._said_at = now
        since, before = self._first
        rest = [f"{_span((total - done) * (now - since) / (done - before))} left"] if done > before else []
        say(", ".join([f"{self._description} {done:,} of {total:,}", *rest, *([note] if note else [])]))


def _span(seconds: float) -> str:
    """``40 s``, ``4 min`` or ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
