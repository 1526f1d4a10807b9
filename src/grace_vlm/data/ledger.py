"""Which rows could not be used, and when there are too many of them.

The ledger is a JSONL file, a line a bad row, in the order in which they were found::

    {"row": 17, "id": "0017", "kind": "image_truncated", "reason": "'images/17.jpg': the JPEG data ends early, ..."}

A row has one line, whatever happens: a second epoch or a resumed run finds the line already there, and a line that a
kill cut in half is removed when the ledger is opened. Conversions (a CMYK picture, say) are no faults: they are counted
beside the ledger and never written into it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from grace_vlm.data.rows import Fault
from grace_vlm.errors import DataError

TRAINING_MAX_BAD_FRACTION = 0.001
EVALUATION_MAX_BAD_FRACTION = 0.0


class Ledger:
    """An append-only file of faults, one line a row.

    Args:
        path: created with its folder when missing; existing whole lines count as written.

    Raises:
        DataError: the file holds a line that no ledger writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._faults = {fault.row: fault for fault in _open_ledger(self.path)}
        self.conversions: Counter[str] = Counter()

    @property
    def faults(self) -> tuple[Fault, ...]:
        """All faults, in the order of the file."""
        return tuple(self._faults.values())

    def add(self, fault: Fault) -> bool:
        """Write the fault; False if its row is already there."""
        if fault.row in self._faults:
            return False
        self._faults[fault.row] = fault
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(fault)) + "\n")
        return True

    def add_conversions(self, conversions: Iterable[str]) -> None:
        """Count what was converted; once a picture is the caller's business."""
        self.conversions.update(conversions)

    def counts(self) -> dict[str, int]:
        """Faults by kind, in the order of the kinds' names."""
        return dict(sorted(Counter(fault.kind for fault in self.faults).items()))


def whole_lines(path: Path) -> bytes:
    """The whole lines of a file that lines are appended to; what a kill left behind the last one is cut off there."""
    data = path.read_bytes()
    num_whole = data.rfind(b"\n") + 1
    if num_whole < len(data):
        os.truncate(path, num_whole)
    return data[:num_whole]


def _open_ledger(path: Path) -> list[Fault]:
    """The whole lines of the file, which is made if missing and cut after its last whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    faults = []
    for number, line in enumerate(whole_lines(path).splitlines(), start=1):
        try:
            faults.append(Fault(**json.loads(line)))
        except (ValueError, TypeError):
            raise DataError(f"{path} line {number} is no line of a ledger; move the file away") from None
    return faults


class BadRowBudget:
    """How many bad rows a set may have: ``floor(max_fraction * num_rows)``, judged on the whole set.

    The fraction is of the set, never of the rows seen so far, so an unlucky start cannot stop a run whose set is
    within budget, and the same set has the same verdict in every order. A set of 10,000 rows or more allows at least
    10 at the default 0.1 %; one below 1,000 rows allows none. A row counts once, however often it is met.

    Args:
        max_fraction: in [0, 1]; ``TRAINING_MAX_BAD_FRACTION`` by default for training, 0 for evaluation.
        num_rows: of the set.
        found: faults already in the ledger of a resumed run; they count, and do not raise by themselves.
    """

    def __init__(self, max_fraction: float, num_rows: int, found: Iterable[Fault] = ()) -> None:
        self.max_fraction = max_fraction
        self.num_rows = num_rows
        self.num_allowed = math.floor(max_fraction * num_rows + 1e-9)  # 0.001 * 3000 is 3, also in floating point
        self._bad_rows = {fault.row for fault in found}

    @property
    def num_bad(self) -> int:
        """Different bad rows so far."""
        return len(self._bad_rows)

    def charge(self, fault: Fault) -> None:
        """Count one bad row.

        Raises:
            DataError: it is the one that crosses the budget.
        """
        self._bad_rows.add(fault.row)
        if self.num_bad > self.num_allowed:
            advice = " or raise data.max_bad_fraction" if self.max_fraction else ""
            raise DataError(
                f"row {fault.row} ({fault.id!r}) is bad, {fault.kind}: {fault.reason}; {self.num_bad} bad rows of "
                f"{self.num_rows} are over the budget of {self.num_allowed} ({self.max_fraction:.4g} of the rows); "
                f"list them with 'grace data check', then repair them{advice}"
            )

    def require_within(self, num_bad: int) -> None:
        """``DataError`` if so many, found by several processes, are over the budget of the set."""
        if num_bad > self.num_allowed and num_bad > self.num_bad:
            raise DataError(
                f"{num_bad} bad rows of {self.num_rows}, over all processes, are over the budget of {self.num_allowed} "
                f"({self.max_fraction:.4g} of the rows); list them with 'grace data check', then repair them"
            )
