"""Student's t: intervals and tests of a mean over few units (seeds, windows of a text), whose spread is itself a guess.

    P(|T| > t) = I_x(n / 2, 1 / 2),   x = n / (n + t^2),   n degrees of freedom

with I the regularized incomplete beta function (Abramowitz and Stegun 26.7.1), by its continued fraction (26.5.8).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def t_p(t: float, degrees: float) -> float:
    """Two-sided p of ``t`` with ``degrees`` >= 1 of freedom."""
    x = degrees / (degrees + t * t)
    return 1.0 if x == 1 else _incomplete_beta(degrees / 2, 0.5, x)


def t_quantile(degrees: float, confidence: float = 0.95) -> float:
    """The t that |T| exceeds with probability 1 - ``confidence``."""
    low, high = 0.0, 1.0
    while t_p(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p(middle, degrees) > 1 - confidence else (low, middle)
    return (low + high) / 2


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Of the mean of ``values``; (nan, nan) of fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    half = t_quantile(len(values) - 1, confidence) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of "the mean difference is 0" from paired differences (one a seed); nan of fewer than two, and of
    differences that are all the same, which say nothing of how far another would be."""
    if len(differences) < 2:
        return math.nan
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    if spread == 0:
        return 1.0 if mean == 0 else math.nan
    return t_p(mean / (spread / math.sqrt(len(differences))), len(differences) - 1)


def welch(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, p): the 95 % interval of mean(one) - mean(other), and the two-sided p of "the means are equal", of
    independent values whose spreads may differ (Welch 1947); nan of fewer than two on a side, or of no spread."""
    if min(len(one), len(other)) < 2:
        return math.nan, math.nan, math.nan
    parts = [statistics.variance(values) / len(values) for values in (one, other)]
    if not sum(parts):
        return math.nan, math.nan, math.nan
    degrees = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (one, other), strict=True))
    mean, error = statistics.mean(one) - statistics.mean(other), math.sqrt(sum(parts))
    half = t_quantile(degrees) * error
    return mean - half, mean + half, t_p(mean / error, degrees)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) for 0 < x < 1."""
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # Lentz's evaluation.
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value / a
