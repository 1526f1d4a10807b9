"""What the mix is made of: which part has which share of the rows, and so how many units are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_ROWS = 165_000
MIN_ROWS = 600
TEST_FRACTION = 0.04
SHARES: dict[str, float] = {
    "emoji": 0.37,
    "flags": 0.15,
    "tables": 0.13,
    "digits": 0.06,
    "easy": 0.09,
    "scenes": 0.08,
    "suite": 0.12,
}
"""Part -> its share of the rows; a part that is not there leaves its share to the others."""
UNSEEN_SHARES: dict[str, float] = {"emoji": 0.11, "flags": 0.05}
"""Of the rows of the test: those about things that training never shows."""
_JOB_UNITS = 64
_CYCLES = {"suite": 7}
"""Units of a part come in rounds: seven benchmarks, one after the other."""


@dataclass(frozen=True)
class Job:
    """A stretch of one part's units: what a process draws in one go."""

    part: str
    split: str
    start: int
    stop: int


def plan(num_rows: int, rows_per_unit: Mapping[str, Mapping[str, float]]) -> list[Job]:
    """Jobs for about ``num_rows`` rows to train on, those of the tests first.

    Args:
        rows_per_unit: part -> split -> mean rows of a unit, of the parts that are there. One of ``suite`` has many
            pictures.
    """
    shares = {part: SHARES[part] for part in SHARES if part in rows_per_unit}
    whole = sum(shares.values())
    num_test = num_rows * TEST_FRACTION
    unseen = {part: share for part, share in UNSEEN_SHARES.items() if part in rows_per_unit}
    wanted = [("unseen", part, share * num_test) for part, share in unseen.items()]
    rest = num_test * (1 - sum(unseen.values()))
    wanted += [("test", part, share / whole * rest) for part, share in shares.items()]
    wanted += [("train", part, share / whole * num_rows) for part, share in shares.items()]
    jobs = []
    for split, part, rows in wanted:
        num_units = max(1, math.ceil(rows / rows_per_unit[part][split]))
        cycle = _CYCLES.get(part, 1)
        num_units = cycle * max(1, round(num_units / cycle))
        step = 1 if part == "suite" else _JOB_UNITS
        jobs += [Job(part, split, start, min(start + step, num_units)) for start in range(0, num_units, step)]
    return jobs
