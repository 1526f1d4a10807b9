"""Look at every row and every picture of an annotation file before training does: ``grace data check FILE``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grace_vlm.data.ledger import Ledger
from grace_vlm.data.rows import Fault, Row, RowFile
from grace_vlm.media.image import DEFAULT_LIMITS, ImageLimits

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    ``counts`` counts faults by kind; ``conversions`` counts pictures, each distinct path once, by what was converted.
    """

    num_rows: int
    num_images: int
    faults: tuple[Fault, ...]
    counts: Mapping[str, int]
    conversions: Mapping[str, int]

    @property
    def num_good(self) -> int:
        """Rows that training and evaluation can use."""
        return self.num_rows - len(self.faults)


def check_file(
    path: Path,
    root: Path | None = None,
    ledger_path: Path | None = None,
    progress: Progress | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> CheckReport:
    """Parse every row and decode every distinct picture once.

    Args:
        path, root, limits: as for ``RowFile``.
        ledger_path: written anew, a line a bad row; None writes none.
        progress: called after each row with (rows done, rows in all).

    Raises:
        DataError: the file as a whole cannot be read.
    """
    rows = RowFile(path, root, limits)
    verdicts: dict[str, Fault | None] = {}  # image path -> its fault, None when good
    conversions: Counter[str] = Counter()
    faults: list[Fault] = []
    for num_done, row in enumerate(rows, start=1):
        fault = row if isinstance(row, Fault) else _check_images(rows, row, verdicts, conversions)
        if fault is not None:
            faults.append(fault)
        if progress is not None:
            progress(num_done, len(rows))
    if ledger_path is not None:
        Path(ledger_path).unlink(missing_ok=True)
        ledger = Ledger(ledger_path)
        for fault in faults:
            ledger.add(fault)
    counts = Counter(fault.kind for fault in faults)
    return CheckReport(
        len(rows), len(verdicts), tuple(faults), dict(sorted(counts.items())), dict(sorted(conversions.items()))
    )


def _check_images(
    rows: RowFile, row: Row, verdicts: dict[str, Fault | None], conversions: Counter[str]
) -> Fault | None:
    """The first fault among the row's pictures, if any. A bad picture makes every row that shows it bad."""
    for image in row.images:
        if image not in verdicts:
            loaded = rows.load_image(row, image)
            if isinstance(loaded, Fault):
                verdicts[image] = loaded
            else:
                verdicts[image] = None
                conversions.update(loaded.conversions)
        known = verdicts[image]
        if known is not None:
            return Fault(row.index, row.id, known.kind, known.reason)
    return None
