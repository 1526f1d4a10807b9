"""The headline made again, beside the first: what falls inside its intervals, and what does not.

What is not trained has no interval over seeds and gives the same answers or others; of what is trained the mean of the
new rows is looked for in the interval of the old ones, which is over seeds: of one teacher, one student, one machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from smollm2_runs import Runs, cell, is_untrained, scheme_of
from smollm2_units import Measure, Row, test_right, text_loss

from grace_vlm.evals.student_t import t_interval

SHOWN: tuple[tuple[str, Measure, Any], ...] = (("questions %", test_right, float), ("perplexity", text_loss, math.exp))
"""Title, measure, and what turns it into what is shown."""

SAME = "the same"


def again_table(first: Runs, again: Runs, scheme: str, names: Sequence[str], labels: dict[str, str]) -> list[str]:
    """A line for each method that both have."""
    columns = [column for title, _, _ in SHOWN for column in (f"{title}, first [95 %]", "again")]
    lines = [f"| {scheme.upper()} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        key = (name, scheme_of(name, scheme))
        if key in first and key in again:
            cells = [text for _, measure, shown in SHOWN for text in _pair(first[key], again[key], measure, shown)]
            lines.append(f"| {labels[name]} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def _pair(first: dict[int | None, Row], again: dict[int | None, Row], measure: Measure, shown: Any) -> tuple[str, str]:
    """(what it was with its interval, what it is)."""
    old, new = ([value for row in rows.values() if (value := measure(row)) is not None] for rows in (first, again))
    if not (old and new):
        return "", ""
    if is_untrained(first) or len(old) < 2:
        return cell(old, of=shown), SAME if answers_of(first) == answers_of(again) else cell(new, of=shown)
    low, high = t_interval(old)
    mean = statistics.mean(new)
    outside = "" if low <= mean <= high else ", outside"
    return f"{shown(statistics.mean(old)):.2f} [{shown(low):.2f}, {shown(high):.2f}]", f"{shown(mean):.2f}{outside}"


def answers_of(rows: dict[int | None, Row]) -> list[Any]:
    """Everything that was found out of a method's models, question by question and window by window."""
    return [[row[part] for part in ("suite", "questions", "texts")] for row in rows.values()]
