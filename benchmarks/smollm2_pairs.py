"""Differences of two methods of the SmolLM2 comparison, with intervals and p values.

Seeds are the units: a difference is the mean of the differences seed by seed, with Student's t; what was not trained
stands beside each seed. Of two models that were not trained the units are what they were asked: blocks of a hundred
questions, windows of text. p values of a table are adjusted together (Holm).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from smollm2_jobs import ROUNDED, SCHEME, SEARCHED
from smollm2_runs import LABELS, Runs, is_untrained, scheme_of
from smollm2_units import MEASURES, Measure, divergence, units_of

from grace_vlm.evals.statistics import holm
from grace_vlm.evals.student_t import t_interval, t_test

PAIRS = (
    *((name, "rtn_minmax") for name in (*ROUNDED, *SEARCHED) if name != "rtn_minmax"),
    *((name, "gptq") for name in ("block", *SEARCHED)),
    *((name, "block") for name in SEARCHED),
    *((name, "qat") for name in ("kd", "grace")),
    ("grace", "kd"),
    *((name, "student") for name in SEARCHED),
    ("teacher", "student"),
)

Pair = tuple[tuple[str, str], tuple[str, str], str]
"""(name, scheme) of both, and what their difference is called."""


class Tested(NamedTuple):
    """A line of a table. seeds: the difference of each; p, adjusted: NaN where nothing is tested."""

    label: str
    measure: str
    seeds: list[float]
    low: float
    high: float
    p: float
    adjusted: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.seeds)


def pairs_of(scheme: str) -> list[Pair]:
    """The methods' pairs at a width; teacher and student, which have none, at the headline's alone."""
    return [
        ((a, scheme_of(a, scheme)), (b, scheme_of(b, scheme)), f"{LABELS[a]} - {LABELS[b]}")
        for a, b in PAIRS
        if scheme == SCHEME or a != "teacher"
    ]


def pairs_with_grace(names: Sequence[str]) -> list[Pair]:
    return [((name, SCHEME), ("grace", SCHEME), f"{LABELS.get(name, f'`{name}`')} - GRACE") for name in names]


def differences(one: dict[int | None, Any], other: dict[int | None, Any], measure: Measure) -> list[float]:
    """Seed by seed; what was not trained stands beside each seed of the other."""
    seeds = [seed for seed in one if seed in other or None in other] or [seed for seed in other if None in one]
    seeds.sort(key=lambda seed: -1 if seed is None else seed)
    found = []
    for seed in seeds:
        a, b = measure(one.get(seed) or one[None]), measure(other.get(seed) or other[None])
        if a is not None and b is not None:
            found.append(a - b)
    return found


def unit_differences(one: dict[int | None, Any], other: dict[int | None, Any], measure: Measure) -> list[float]:
    """Of two models that were not trained, unit by unit of what they were asked; none of others."""
    if not (is_untrained(one) and is_untrained(other)):
        return []
    a, b = units_of((one[None], other[None]), measure)
    return [x - y for x, y in zip(a, b, strict=True)]


def tested(runs: Runs, pairs: Sequence[Pair]) -> list[Tested]:
    """Every pair and measure that there is, p adjusted for all of them."""
    rows: list[tuple[str, str, list[float], list[float]]] = []
    for one, other, label in pairs:
        if one not in runs or other not in runs:
            continue
        for name, measure in MEASURES.items():
            if measure is divergence and "student" in (one[0], other[0]):
                continue  # what it is measured from
            if found := differences(runs[one], runs[other], measure):
                rows.append((label, name, found, unit_differences(runs[one], runs[other], measure) or found))
    ps = [t_test(units) for *_, units in rows]
    adjusted = iter(holm([p for p in ps if not math.isnan(p)]))
    return [
        Tested(label, name, found, *t_interval(units), p, math.nan if math.isnan(p) else next(adjusted))
        for (label, name, found, units), p in zip(rows, ps, strict=True)
    ]


def shown_p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-10 else "< 1e-10"


def pair_table(runs: Runs, pairs: Sequence[Pair]) -> list[str]:
    """Of every pair and measure the mean difference, its interval, p, and p adjusted for all of the table."""
    lines = ["| difference of | in | mean [95 %] | p | p, Holm | by seed |", "|---" * 6 + "|"]
    for one in tested(runs, pairs):
        shown = f"{one.mean:+.3f}" + ("" if math.isnan(one.low) else f" [{one.low:+.3f}, {one.high:+.3f}]")
        ps = ("", "") if math.isnan(one.p) else (shown_p(one.p), shown_p(one.adjusted))
        seeds = ", ".join(f"{value:+.2f}" for value in one.seeds) if len(one.seeds) > 1 else ""
        lines.append(f"| {one.label} | {one.measure} | {shown} | {ps[0]} | {ps[1]} | {seeds} |")
    return lines if len(lines) > 2 else []
