"""Percentile intervals by drawing whole groups of questions again.

Questions about one picture, and rotations of one question, are right or wrong together; taken as independent they give
an interval that is too narrow. So the group is what is drawn: G groups with replacement out of G, all rows of a drawn
group with it, B times; the interval's ends are quantiles of the B means (Efron and Tibshirani 1993, section 13.3, over
clusters as Davison and Hinkley 1997, section 3.8: "strategy 1", clusters drawn, members kept).

    mean*  =  sum over groups of n_g* s_g  /  sum over groups of n_g* m_g
    (n_1*, ..., n_G*)  ~  Multinomial(G; 1/G, ..., 1/G)      s_g, m_g: sum of the values and number of rows of group g

Groups with the same totals are interchangeable, so a multinomial draw over the *distinct* totals, each with its share
of the groups, has the same distribution and costs little: outcomes of 14,000 pictures have a dozen distinct totals.

The result is a function of the seed and of the set of (group, values): the order of rows, shards and batches, and the
groups' names, change no digit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
_CHUNK_ELEMENTS = 4_000_000
"""Counts that are held at once: 32 MB."""


def cluster_interval(
    correct: Sequence[bool],
    groups: Sequence[Hashable],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(accuracy, lower, upper) as fractions; rows of the same value in ``groups`` are drawn together.

    One group alone says nothing about others: the interval is (0, 1).
    """
    totals = group_totals([float(outcome) for outcome in correct], groups)
    mean, low, high = ratio_interval([totals], num_resamples=num_resamples, seed=seed, confidence=confidence)
    return (mean, low, high) if len(totals) > 1 else (mean, 0.0, 1.0)


def paired_cluster_interval(
    correct_a: Sequence[bool],
    correct_b: Sequence[bool],
    groups: Sequence[Hashable],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(accuracy of a - accuracy of b, lower, upper): both models on the same drawn groups, so what both find hard or
    easy cancels. One group alone: (-1, 1)."""
    differences = [int(a) - int(b) for a, b in zip(correct_a, correct_b, strict=True)]
    totals = group_totals([float(difference) for difference in differences], groups)
    mean, low, high = ratio_interval([totals], num_resamples=num_resamples, seed=seed, confidence=confidence)
    return (mean, low, high) if len(totals) > 1 else (mean, -1.0, 1.0)


def group_totals(values: Sequence[float], groups: Sequence[Hashable]) -> dict[Hashable, tuple[float, int]]:
    """Group -> (sum of its values, number of its rows); sums are exactly rounded, whatever the order of the rows."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    return {group: (math.fsum(found), len(found)) for group, found in members.items()}


def ratio_interval(
    measures: Sequence[dict[Hashable, tuple[float, int]]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(mean, lower, upper) of the mean of several ratios that one drawing of groups moves together.

    Args:
        measures: for each ratio, group -> (numerator, denominator), for the same groups. HallusionBench's mean of
            three: groups are sets; numerators the right rows, figures and questions of a set, denominators all.

    A resample in which a denominator is 0 is left out; a ratio whose denominator is 0 in all is an error.
    """
    groups = set(measures[0]) if measures else set()
    if not groups:
        raise ValueError("an interval of no outcomes")
    if any(set(measure) != groups for measure in measures):
        raise ValueError("measures of different groups")
    table = np.array([[x for measure in measures for x in measure[group]] for group in groups], dtype=np.float64)
    mean = float(_ratios(np.array([[math.fsum(column) for column in table.T]]))[0])
    if math.isnan(mean):
        raise ValueError("a ratio with nothing in its denominator")
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    drawn = _ratios(resampled_totals(kinds, counts, num_resamples, np.random.default_rng(seed)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn[~np.isnan(drawn)], [tail, 1 - tail])
    return mean, float(low), float(high)


def resampled_totals(
    kinds: NDArray[np.float64], counts: NDArray[np.int64], num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(num_resamples, columns): totals of as many groups as there are, drawn with replacement."""
    num_groups = int(counts.sum())
    share = counts / num_groups
    step = max(1, _CHUNK_ELEMENTS // len(kinds))
    parts = [
        rng.multinomial(num_groups, share, size=min(step, num_resamples - start)) @ kinds
        for start in range(0, num_resamples, step)
    ]
    return np.concatenate(parts)


def _ratios(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the ratios of each row of (numerator, denominator, numerator, ...); NaN where a denominator is 0."""
    numerators, denominators = totals[:, 0::2], totals[:, 1::2]
    safe = np.where(denominators > 0, denominators, np.nan)
    means: NDArray[np.float64] = (numerators / safe).mean(axis=1)
    return means
