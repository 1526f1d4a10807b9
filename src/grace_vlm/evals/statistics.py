"""Intervals and paired tests for accuracies.

Wilson: the score interval of a proportion. McNemar: exact, two-sided, on the questions that two models answer
differently; the right test for "did quantizing lose anything?", since both see the same questions. Holm: what is left
of several such tests at once. Where questions share a picture or are rotations of one another they are no independent
draws: the intervals of ``bootstrap.py`` are for those.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


def wilson_interval(num_correct: float, num_total: int, z: float = 1.959963984540054) -> tuple[float, float]:
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of several tests, in their order: each may be compared with the level of the whole family.

    Holm 1979, step-down: with p_(1) <= ... <= p_(m), adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    for p in p_values:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{p} is no p value")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def disagreement_rate(answers_a: Sequence[Hashable], answers_b: Sequence[Hashable]) -> float:
    """Share of questions with different answers, right or wrong: #{i: a_i != b_i} / n. Two models of one accuracy may
    well disagree; the discordant pairs of McNemar are only a part of this (churn, Milani Fard et al. 2016)."""
    _check_pairs(answers_a, answers_b)
    if not answers_a:
        raise ValueError("a disagreement rate of no answers")
    return sum(a != b for a, b in zip(answers_a, answers_b, strict=True)) / len(answers_a)


@dataclass(frozen=True)
class Flips:
    """Keys of questions whose outcome differs: ``lost`` went from right to wrong, ``gained`` from wrong to right."""

    lost: tuple[str, ...]
    gained: tuple[str, ...]


def flips(keys: Sequence[str], correct_a: Sequence[bool], correct_b: Sequence[bool]) -> Flips:
    """Which questions b loses and gains against a, in the order of ``keys``; their numbers are McNemar's two counts."""
    _check_pairs(correct_a, correct_b)
    outcomes = list(zip(keys, correct_a, correct_b, strict=True))
    lost = tuple(key for key, a, b in outcomes if a and not b)
    return Flips(lost, tuple(key for key, a, b in outcomes if b and not a))


def _check_pairs(a: Sequence[object], b: Sequence[object]) -> None:
    if len(a) != len(b):
        raise ValueError(f"paired comparison of {len(a)} and {len(b)} outcomes")
