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
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from grace_vlm.evals.statistics import wilson_interval

NUM_RESAMPLES = 10_000
Entry = tuple[str, float, float]
"""(group, value of one unit in [0, 1], its weight in the mean)."""
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


def components_interval(components: Sequence[Sequence[Entry]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of several weighted means, as fractions: one component for an accuracy, three for the
    mean of aAcc, fAcc and qAcc, one a category for a macro mean.

    Where draws have no spread (every unit is right, every one wrong, all groups are alike) it is Wilson's interval of
    that many groups. (0, 1) of nothing. Any order of the units gives the same interval.
    """
    entries = [entry for component in components for entry in component]
    groups = {group for group, _, _ in entries}
    if not any(weight for _, _, weight in entries):
        return 0.0, 1.0
    values = {value for _, value, weight in entries if weight}
    if values in ({0.0}, {1.0}):
        return wilson_interval(len(groups) if values == {1.0} else 0, len(groups))
    _, low, high = ratio_interval([_weighted_totals(c, groups) for c in components if c], seed=seed)
    return (low, high) if low < high else wilson_interval(low * len(groups), len(groups))


def _weighted_totals(component: Sequence[Entry], groups: Iterable[str]) -> dict[Hashable, tuple[float, float]]:
    """Group -> (weighted sum of values, sum of weights), (0, 0) of a group that the component has no unit of."""
    members: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for group, value, weight in component:
        members[group].append((weight * value, weight))
    own = {g: (math.fsum(v for v, _ in found), math.fsum(w for _, w in found)) for g, found in members.items()}
    return dict.fromkeys(groups, (0.0, 0.0)) | own


def group_totals(values: Sequence[float], groups: Sequence[Hashable]) -> dict[Hashable, tuple[float, int]]:
    """Group -> (sum of its values, number of its rows); sums are exactly rounded, whatever the order of the rows."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    return {group: (math.fsum(found), len(found)) for group, found in members.items()}


def ratio_interval(
    measures: Sequence[Mapping[Hashable, tuple[float, float]]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(mean, lower, upper) of the mean of several ratios that one drawing of groups moves together.

    Args:
        measures: for each ratio, group -> (numerator, denominator), for the same groups. HallusionBench's mean of
            three: groups are sets; numerators the right rows, figures and questions of a set, denominators all.

    In a resample a ratio whose denominator is 0 says nothing, and the mean is of the others; without any the resample
    is left out. A ratio whose denominator is 0 in all groups is an error.
    """
    groups = set(measures[0]) if measures else set()
    if not groups:
        raise ValueError("an interval of no outcomes")
    if any(set(measure) != groups for measure in measures):
        raise ValueError("measures of different groups")
    table = np.array([[x for measure in measures for x in measure[group]] for group in groups], dtype=np.float64)
    whole = np.array([[math.fsum(column) for column in table.T]])
    if not whole[0, 1::2].all():
        raise ValueError("a ratio with nothing in its denominator")
    mean = float(_ratios(whole)[0])
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
    """Mean over the ratios of each row of (numerator, denominator, numerator, ...) whose denominator is above 0; NaN
    where there is none."""
    numerators, denominators = totals[:, 0::2], totals[:, 1::2]
    there = denominators > 0
    ratios = np.divide(numerators, denominators, out=np.zeros_like(numerators), where=there)
    count = there.sum(axis=1)
    means: NDArray[np.float64] = np.where(count > 0, ratios.sum(axis=1) / np.maximum(count, 1), np.nan)
    return means
