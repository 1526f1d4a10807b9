"""Intervals and paired tests for accuracies. Formulas, no dependency.

Wilson: the score interval of a proportion. McNemar: exact, two-sided, on the questions that two models answer
differently; the right test for "did quantizing lose anything?", since both see the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(num_correct: int, num_total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of num_correct / num_total, as fractions (Wilson 1927); (0, 1) without data."""
    if num_total == 0:
        return 0.0, 1.0
    p, n = num_correct / num_total, num_total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def mcnemar_p(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Exact two-sided p of "a and b are equally often right" from paired outcomes (McNemar 1947, binomial form)."""
    if len(correct_a) != len(correct_b):
        raise ValueError(f"paired test on {len(correct_a)} and {len(correct_b)} outcomes")
    only_a = sum(a and not b for a, b in zip(correct_a, correct_b, strict=True))
    only_b = sum(b and not a for a, b in zip(correct_a, correct_b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    log_half = n * math.log(0.5)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half) for i in range(k + 1)
    )
    return min(1.0, 2 * tail)


def paired_difference(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> tuple[float, float, float]:
    """(mean of a - b, lower, upper): 95 % interval of the paired difference, normal approximation, as fractions."""
    n = len(correct_a)
    differences = [int(a) - int(b) for a, b in zip(correct_a, correct_b, strict=True)]
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    half = 1.959963984540054 * math.sqrt(variance / n)
    return mean, mean - half, mean + half
