"""What reaches the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from grace_vlm.errors import printable


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
    """A plain table on standard output: first column left, the others right."""
    table = [list(header), *[[printable(cell) for cell in row] for row in rows]]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for number, line in enumerate(table):
        cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def show(line: str) -> None:
    """One line of a result; what strangers wrote in it cannot break it or colour the terminal."""
    print(printable(line))


class ProgressBar:
    """A Rich bar on standard error; silent where that is no terminal, or it is not to be shown."""

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

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Move to ``done`` of ``total``."""
        fields = {"description": note} if note else {}
        self._progress.update(self._task, completed=done, total=total, **fields)  # type: ignore[arg-type]
