"""What is measured of a row of the SmolLM2 comparison, and what each measure is the mean of.

Two models that were not trained have no seeds to differ by; they differ from question to question. The units are then
blocks of a hundred questions, since those of one picture stand together and are right or wrong together, and windows
of text (neighbours are of one address: an interval over them is some 15 to 45 % too narrow for other addresses).
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from smollm2_rows import is_reported, loss_of, mean_of_suite

from grace_vlm.evals.student_t import t_interval

Row = dict[str, Any]
Measure = Callable[[Row], float | None]


def test_right(row: Row) -> float | None:
    """Share of the questions that no learning rate was chosen on, in per cent."""
    bits = row["questions"].get("correct", "")
    own = [bit == "1" for number, bit in enumerate(bits) if is_reported(number)]
    return 100 * statistics.mean(own) if own else None


def suite(row: Row) -> float | None:
    value = mean_of_suite(row)
    return None if value is None else 100 * value


def text_loss(row: Row) -> float | None:
    return loss_of(row, "prose") if "prose" in row["texts"] else None


def divergence(row: Row) -> float | None:
    values = row["texts"].get("prose", {}).get("divergences")
    return statistics.mean(values) if values else None


def agreement(row: Row) -> float | None:
    value = row["texts"].get("prose", {}).get("agreement")
    return None if value is None else 100 * value


MEASURES: dict[str, Measure] = {
    "toy suite %": suite,
    "questions %": test_right,
    "log perplexity": text_loss,
    "KL to BF16": divergence,
}


def question_blocks(row: Row) -> list[float]:
    """What each hundred gives to ``test_right``, times the number of blocks: a last one that is shorter counts less."""
    bits = row["questions"].get("correct", "")
    blocks = [bits[at : at + 100] for at in range(0, len(bits), 100) if is_reported(at)]
    each = sum(map(len, blocks)) / max(1, len(blocks))
    return [100 * block.count("1") / each for block in blocks]


def window_losses(row: Row) -> list[float]:
    return list(row["texts"].get("prose", {}).get("losses", ()))


def window_divergences(row: Row) -> list[float]:
    return list(row["texts"].get("prose", {}).get("divergences") or ())


UNITS: dict[Measure, Callable[[Row], list[float]]] = {
    test_right: question_blocks,
    text_loss: window_losses,
    divergence: window_divergences,
}
"""What a measure is the mean of. (The suite is the mean of seven scores of seven kinds.)"""


def units_of(rows: Sequence[Row], measure: Measure) -> list[list[float]]:
    """The units of each row, all asked the same; none of a measure without."""
    if measure not in UNITS:
        return [[] for _ in rows]
    found = [UNITS[measure](row) for row in rows]
    if len({len(units) for units in found}) > 1:
        names = ", ".join(f"{row['name']} {len(units)}" for row, units in zip(rows, found, strict=True))
        sys.exit(f"rows were asked different numbers of questions ({names}); make them with the same --limit")
    return found


def share_interval(whole: Row, lost: Row, own: Row, measure: Measure) -> tuple[float, float]:
    """Of 100 (own - lost) / (whole - lost), a ratio of two means over the same units, by Student's t of the units' own
    departures from it (Cochran, Sampling Techniques, 6.4); nan of fewer than two units."""
    good, bad, mine = units_of((whole, lost, own), measure)
    if len(mine) < 2:
        return math.nan, math.nan
    gaps = [a - b for a, b in zip(good, bad, strict=True)]
    gains = [a - b for a, b in zip(mine, bad, strict=True)]
    share, gap = sum(gains) / sum(gaps), statistics.mean(gaps)
    low, high = t_interval([share + (gain - share * one) / abs(gap) for gain, one in zip(gains, gaps, strict=True)])
    return 100 * low, 100 * high
