"""Correlation and binned fit on points whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grace_vlm.evals.charts import Bin
from grace_vlm.evals.why.fit import equal_width_bins, line_of_bins, pearson


def bins(points: list[tuple[float, int, int]]) -> list[Bin]:
    return [Bin(mean, wrong, num, 0.0, 1.0) for mean, wrong, num in points]


def test_r_is_that_of_numpy() -> None:
    draw = np.random.default_rng(0)
    x = draw.random(500)
    y = (draw.random(500) < x).astype(float)
    found = pearson(x.tolist(), y.tolist(), range(500))
    assert found.r == pytest.approx(float(np.corrcoef(x, y)[0, 1]), abs=1e-12)
    assert found.low is not None
    assert found.high is not None
    # Fisher's interval is for normal pairs; a drawn one must be of its size.
    half = 1.96 / math.sqrt(500) * (1 - found.r**2)
    assert found.low == pytest.approx(found.r - half, abs=0.03)
    assert found.high == pytest.approx(found.r + half, abs=0.03)


def test_a_line_has_r_1_and_its_mirror_minus_1() -> None:
    x = [0.1 * i for i in range(20)]
    assert pearson(x, [3 + 2 * v for v in x], range(20)).r == pytest.approx(1.0)
    assert pearson(x, [-v for v in x], range(20)).r == pytest.approx(-1.0)


def test_copies_in_one_row_do_not_make_the_interval_narrower() -> None:
    draw = np.random.default_rng(1)
    x = draw.random(200)
    y = (draw.random(200) < x).astype(float)
    alone = pearson(x.tolist(), y.tolist(), range(200))
    copied = pearson(np.repeat(x, 6).tolist(), np.repeat(y, 6).tolist(), np.repeat(np.arange(200), 6).tolist())
    assert (copied.r, copied.low, copied.high) == pytest.approx((alone.r, alone.low, alone.high), abs=1e-9)


def test_a_shift_far_from_zero_changes_nothing() -> None:
    draw = np.random.default_rng(2)
    x, y = draw.random(300), draw.random(300)
    assert pearson((x + 1e7).tolist(), y.tolist(), range(300)).r == pytest.approx(
        pearson(x.tolist(), y.tolist(), range(300)).r, abs=1e-6
    )


def test_without_spread_there_is_no_r() -> None:
    assert pearson([1.0, 1.0], [0.0, 1.0], [0, 1]).r is None
    assert pearson([1.0, 2.0], [1.0, 1.0], [0, 1]).r is None
    assert pearson([], [], []).r is None
    one_row = pearson([1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [7, 7, 7])
    assert (one_row.r, one_row.low, one_row.high) == (pytest.approx(0.0), -1.0, 1.0)
    with pytest.raises(ValueError, match="a correlation of 2 and 1 values in 2 groups"):
        pearson([1.0, 2.0], [1.0], [0, 1])


def test_bins_on_a_line_are_explained_whole() -> None:
    found = line_of_bins(bins([(0.0, 10, 100), (1.0, 30, 100), (2.0, 50, 100), (4.0, 90, 100)]))
    assert (found.slope, found.intercept, found.r_squared) == pytest.approx((0.2, 0.1, 1.0))


def test_r_squared_is_the_square_of_the_bins_own_r() -> None:
    rows = [(0.0, 5, 100), (1.0, 40, 100), (2.0, 20, 50), (3.0, 60, 90)]
    found = line_of_bins(bins(rows))
    r = np.corrcoef([x for x, _, _ in rows], [w / n for _, w, n in rows])[0, 1]
    assert found.r_squared == pytest.approx(r**2)


def test_a_heap_and_two_points_are_no_line() -> None:
    """Teachers that are nearly always sure: all errors in a bin or two fit a line whatever they are."""
    assert line_of_bins(bins([(0.0, 0, 100)] * 8 + [(0.1, 3, 100), (0.7, 40, 100)])).r_squared is None
    assert line_of_bins([]).slope is None
    flat = line_of_bins(bins([(0.0, 5, 10), (1.0, 5, 10), (2.0, 5, 10)]))
    assert (flat.slope, flat.intercept, flat.r_squared) == (0.0, 0.5, None)


def test_bins_of_one_width() -> None:
    points = [(0.05, 0)] * 30 + [(0.15, 1)] * 10 + [(0.35, 1)] * 3 + [(1.0, 1)] * 20 + [(1.0, 0)] * 20
    found = equal_width_bins(points, 10)
    assert [(round(b.mean, 3), b.num_wrong, b.num) for b in found] == [(0.05, 0, 30), (0.15, 10, 10), (1.0, 20, 40)]
    assert found[2].low < 0.5 < found[2].high
    assert equal_width_bins([], 10) == equal_width_bins([(0.0, 1)] * 20, 10) == []
