"""Two evaluations, the same questions: what one lost against the other, where, and whether it is noise.

Scores are compared row by row. The interval is of a bootstrap over the rows, or over the groups that a benchmark's rows
come in; the p value is McNemar's exact one of the rows that exactly one of them has right, held against all tasks by
Holm's method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.errors import ConfigError
from grace_vlm.evals.statistics import mcnemar_p, paired_difference
from grace_vlm.evals.suite.score import read_lines

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Of one task, ``own`` against ``base``, as fractions.

    Args:
        lost, won: ids of rows that went from right to wrong and back. disagreement: share of rows whose parsed answers
            differ.
    """

    task: str
    num_rows: int
    mean: float
    low: float
    high: float
    p_value: float
    disagreement: float
    lost: tuple[str, ...]
    won: tuple[str, ...]


def read_records(folder: Path, profile: str) -> dict[str, Lines]:
    """Records of an evaluation by task; ``ConfigError`` if it has none of the profile."""
    files = sorted((folder / "records" / profile).glob("*.jsonl"))
    if not files:
        raise ConfigError(f"{folder} has no records of the profile {profile}; run grace eval --suite with it first")
    return {file.stem: read_lines(file) for file in files}


def difference(task: str, own: Lines, base: Lines) -> Difference:
    """
    Raises:
        ConfigError: the two are not of the same rows.
    """
    if [line["id"] for line in own] != [line["id"] for line in base]:
        raise ConfigError(
            f"the two evaluations of {task} are of other rows ({len(own)} and {len(base)}); run both alike"
        )
    mine, theirs = ([line["score"] == 1.0 for line in lines] for lines in (own, base))
    mean, low, high = paired_difference(mine, theirs)
    ids = [str(line["id"]) for line in own]
    lost = tuple(name for name, a, b in zip(ids, mine, theirs, strict=True) if b and not a)
    won = tuple(name for name, a, b in zip(ids, mine, theirs, strict=True) if a and not b)
    apart = sum(a["parsed"] != b["parsed"] for a, b in zip(own, base, strict=True)) / max(1, len(own))
    return Difference(task, len(own), mean, low, high, mcnemar_p(mine, theirs), apart, lost, won)
