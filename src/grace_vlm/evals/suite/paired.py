"""Two evaluations, the same questions: what one lost against the other, where, and whether it is noise.

Scores are compared row by row: the mean difference, its 95 % interval by drawing again whatever rows have in common (a
set of figures, a question's rotations, a picture), and McNemar's exact p of the rows that only one of the two has
right, which Holm's method holds against the number of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.errors import ConfigError
from grace_vlm.evals.bootstrap import paired_cluster_interval
from grace_vlm.evals.statistics import disagreement_rate, flips, mcnemar_p
from grace_vlm.evals.suite.score import read_lines
from grace_vlm.evals.suite.tables import read_scores

CLUSTERS = ("set", "circular", "diagram", "picture")
"""Names of a row's groups by which rows are right or wrong together; a row without one is its own."""
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
    if not (folder / "run.json").is_file():
        raise ConfigError(
            f"{folder} is no evaluation (no run.json); expected what grace eval MODEL --suite --out wrote"
        )
    files = sorted((folder / "records" / profile).glob("*.jsonl"))
    if not files:
        known = ", ".join(sorted(path.name for path in (folder / "records").glob("*"))) or "none"
        raise ConfigError(
            f"{folder} has no records of the profile {profile} (but of: {known}); pass one of those as --profile, or "
            "run grace eval --suite with it first"
        )
    return {file.stem: read_lines(file) for file in files}


def require_same_data(own: Path, base: Path, tasks: Sequence[str]) -> None:
    """``ConfigError`` unless both evaluations asked the same rows of the same files."""
    mine, theirs = (read_scores(folder)["data"] for folder in (own, base))
    for task in tasks:
        if mine.get(task) != theirs.get(task):
            raise ConfigError(
                f"{own} and {base} are of different {task} files ({mine.get(task)}; {theirs.get(task)}); ask both on "
                "the same --data with the same --limit"
            )


def difference(task: str, own: Lines, base: Lines) -> Difference:
    """
    Raises:
        ConfigError: the two are not of the same rows.
    """
    if [line["id"] for line in own] != [line["id"] for line in base]:
        raise ConfigError(f"evaluations of {task} have different rows ({len(own)} and {len(base)}); run both alike")
    mine, theirs = ([line["score"] == 1.0 for line in lines] for lines in (own, base))
    mean, low, high = paired_cluster_interval(mine, theirs, [cluster_of(line["groups"], line["id"]) for line in base])
    ids = [str(line["id"]) for line in own]
    turned = flips(ids, theirs, mine)
    apart = disagreement_rate(*([line["parsed"] for line in lines] for lines in (own, base)))
    p_value = mcnemar_p(mine, theirs)
    return Difference(task, len(own), mean, low, high, p_value, apart, turned.lost, turned.gained)


def cluster_of(groups: Mapping[str, str], row: str) -> str:
    """By which a row is right or wrong together with others: the first of ``CLUSTERS`` that it has, or itself."""
    return next((f"{name} {groups[name]}" for name in CLUSTERS if name in groups), f"row {row}")
