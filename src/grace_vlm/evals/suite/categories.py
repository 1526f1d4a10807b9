"""Scores by category: what each benchmark's own breakdown is called, and the numbers of one column of it.

Benchmarks name their groups apart: MMBench and MMStar have a category, MMMU disciplines and subjects, SEED-Bench types
of question. ``category`` stands for each one's main column; any column's own name, and ``all``, are taken too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grace_vlm.errors import ConfigError

MAIN, ALL = "category", "all"
POPULATION = "population"
"""Rows with a picture and rows without: a choice of rows, and no kind of question."""


@dataclass(frozen=True)
class CategoryScore:
    """A metric of the breakdown, as ``scores.json`` has it; ``column`` and ``value`` say of which rows."""

    task: str
    column: str
    value: str
    metric: Mapping[str, Any]


def main_column(columns: Iterable[str]) -> str | None:
    """The column that ``category`` stands for: that of this name, else the first; None of a task without any."""
    kinds = [column for column in columns if column != POPULATION]
    return MAIN if MAIN in kinds else kinds[0] if kinds else None


def category_scores(reports: Mapping[str, Mapping[str, Any]], by: str) -> list[CategoryScore]:
    """Of every task that has the column, in the order of ``reports``.

    Args:
        reports: task -> report, as one profile of ``scores.json`` has them.

    Raises:
        ConfigError: no task has such a column.
    """
    found = []
    for task, report in reports.items():
        breakdown = report["breakdown"]
        wanted = list(breakdown) if by == ALL else [main_column(breakdown) if by == MAIN else by]
        for column in wanted:
            if column is not None and column in breakdown:
                found += [CategoryScore(task, column, value, metric) for value, metric in breakdown[column].items()]
    if not found:
        known = {column for report in reports.values() for column in report["breakdown"]} - {MAIN}
        raise ConfigError(
            f"--by is {by} and no benchmark here has it; expected {', '.join([MAIN, ALL, *sorted(known)])}"
        )
    return found
