"""Rows of the SmolLM2 comparison: a line of JSON each, and what is read off one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import RESULTS

OUT = RESULTS / "smollm2"

LANGUAGE_OUT = OUT / "language"

STAGES_FILE = "stages.json"
"""Beside the rows: what teacher and student took."""

MINUTES_FILE = "minutes.jsonl"
"""Beside the rows: what each call of a command took by the clock, of so many GPUs, for so many rows."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of rows; none if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def read_object(path: Path) -> dict[str, Any]:
    """A file with one object of JSON; an empty one if the file does not exist."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def read_stages(path: Path) -> dict[str, dict[str, Any]]:
    """Stage -> hash of its weights, seconds, device, commit; none if the file does not exist."""
    return read_object(path)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """A line, in one piece and on the disk; several processes may write to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, separators=(",", ":")) + "\n").encode()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["scheme"], row["seed"], row["rate"]


def mean_of_suite(row: dict[str, Any]) -> float | None:
    """Mean over the benchmarks of their own scores."""
    values = [one["value"] for one in row["suite"].values()]
    return sum(values) / len(values) if values else None


def right_of(row: dict[str, Any]) -> float | None:
    """Share of the held-out questions that are right, of those that were asked."""
    bits = row["questions"].get("correct", "")
    num_asked = len(bits) - bits.count("-")
    return bits.count("1") / num_asked if num_asked else None


def loss_of(row: dict[str, Any], text: str) -> float:
    """Mean cross-entropy of a text, nats a token."""
    losses = row["texts"][text]["losses"]
    return float(sum(losses) / len(losses))


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether nobody else has what ``path`` stands for; until the block or the process ends it is ours then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_validation(number: int) -> bool:
    """Questions of one picture follow each other, so blocks of a hundred are dealt out, not single questions."""
    return number // 100 % 2 == 0


def is_reported(number: int) -> bool:
    """The other half, which no rate was chosen on."""
    return not is_validation(number)


def validation_score(row: dict[str, Any]) -> float:
    """Share of right answers on every second hundred of the questions, the report tests on the others; of a row without
    questions its loss on the search's windows, negated."""
    bits = row["questions"].get("correct")
    if not bits:
        return -loss_of(row, "prose")
    own = [bit == "1" for number, bit in enumerate(bits) if is_validation(number)]
    return sum(own) / len(own)


def words_of(key: tuple[Any, ...]) -> list[str]:
    """What of a key is there."""
    return [str(part) for part in key if part is not None]


def shown_of(row: dict[str, Any]) -> str:
    """Its key, scores and time in a line."""
    words = words_of(key_of(row))
    for label, value in (("suite", mean_of_suite(row)), ("questions", right_of(row))):
        words += [] if value is None else [f"{label} {100 * value:.2f}"]
    words += [f"{name} {math.exp(loss_of(row, name)):.3f}" for name in row["texts"]]
    return "  " + " ".join((*words, f"{row['seconds']} s"))
