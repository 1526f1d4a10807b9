"""How two quantities go together: Pearson's r over points, and a line through the means of bins.

    r   =  (sum xy - n x y) / sqrt((sum xx - n x x)(sum yy - n y y))             x, y standing alone: means
    R2  =  1 - sum (y_i - a - b x_i)^2 / sum (y_i - mean)^2                      over bins i, each counts once

A yes-or-no y has an r far below 1 even where its probability is a function of x, because a single outcome is mostly
chance; means of bins have little of that, so R2 says whether the *probability* follows x. Both are in GRACE's section
3.1 (r = .484, binned R2 = .901); which bins, and how many, the authors took is not known here, so there are two kinds:
of equal counts (evals/charts.py), which a heap of certain tokens fills nearly alone, and of equal widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grace_vlm.evals.bootstrap import resampled_totals
from grace_vlm.evals.charts import Bin
from grace_vlm.evals.statistics import wilson_interval

NUM_RESAMPLES = 2000
MIN_POINTS = 10
"""Of a bin of equal width."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's r with its 95 % interval; None where x or y has no spread."""

    r: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x, and the share of the bins' variance that it explains; None for what is not defined."""

    slope: float | None
    intercept: float | None
    r_squared: float | None


def pearson(x: Sequence[float], y: Sequence[float], groups: Sequence[int], seed: int = 0) -> Correlation:
    """
    Args:
        x, y: a value each point. groups: the row of each point; the interval draws whole rows, since tokens of one row
            are no independent draws (evals/bootstrap.py).
    """
    if not len(x) == len(y) == len(groups):
        raise ValueError(f"a correlation of {len(x)} and {len(y)} values in {len(groups)} groups")
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not len(xs):
        return Correlation(None, None, None)
    # r does not change by a shift, and sums of squares lose fewer digits around the mean.
    xs, ys = xs - xs.mean(), ys - ys.mean()
    points = np.stack([np.ones_like(xs), xs, ys, xs * xs, ys * ys, xs * ys], axis=1)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    totals = np.zeros((int(group.max()) + 1, 6))
    np.add.at(totals, group, points)
    r = float(_r_of(totals.sum(axis=0, keepdims=True))[0])
    if math.isnan(r):
        return Correlation(None, None, None)
    drawn = _r_of(
        resampled_totals(totals, np.ones(len(totals), dtype=np.int64), NUM_RESAMPLES, np.random.default_rng(seed))
    )
    known = drawn[~np.isnan(drawn)]
    if len(totals) < 2 or not len(known):
        return Correlation(r, -1.0, 1.0)
    low, high = np.quantile(known, [0.025, 0.975])
    return Correlation(r, float(low), float(high))


def _r_of(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """r of each row (n, sum x, sum y, sum xx, sum yy, sum xy); NaN without spread."""
    n, x, y, xx, yy, xy = totals.T
    spread_x, spread_y = n * xx - x * x, n * yy - y * y
    # What is left of a sum of squares after cancelling is rounding, not spread.
    known = (spread_x > 1e-12 * n * xx) & (spread_y > 1e-12 * n * yy)
    found = np.full(len(totals), np.nan)
    np.divide(n * xy - x * y, np.sqrt(np.abs(spread_x * spread_y)), out=found, where=known)
    return found


def equal_width_bins(points: Sequence[tuple[float, int]], num_bins: int) -> list[Bin]:
    """(value, wrong) points by value, from 0 to the largest in bins of one width; bins of fewer than ``MIN_POINTS`` are
    left out: their share says nothing."""
    top = max((value for value, _ in points), default=0.0)
    if top <= 0:
        return []
    members: list[list[tuple[float, int]]] = [[] for _ in range(num_bins)]
    for point in points:
        members[min(num_bins - 1, int(num_bins * point[0] / top))].append(point)
    found = []
    for own in members:
        if len(own) >= MIN_POINTS:
            wrong = sum(w for _, w in own)
            found.append(
                Bin(math.fsum(v for v, _ in own) / len(own), wrong, len(own), *wilson_interval(wrong, len(own)))
            )
    return found


def line_of_bins(bins: Sequence[Bin]) -> Line:
    """Least squares through (mean, share wrong) of the bins.

    Nothing of fewer than three bins with a wrong point: a line through one of them and a heap at 0 always fits.
    """
    if sum(b.num_wrong > 0 for b in bins) < 3:
        return Line(None, None, None)
    x, y = np.array([b.mean for b in bins]), np.array([b.num_wrong / b.num for b in bins])
    x_apart, y_apart = x - x.mean(), y - y.mean()
    spread = float((x_apart**2).sum())
    if spread == 0:
        return Line(None, None, None)
    slope = float((x_apart * y_apart).sum()) / spread
    whole, left = float((y_apart**2).sum()), float(((y_apart - slope * x_apart) ** 2).sum())
    return Line(slope, float(y.mean()) - slope * float(x.mean()), 1 - left / whole if whole else None)
