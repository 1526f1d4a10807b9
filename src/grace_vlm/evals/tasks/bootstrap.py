"""The interval of a score whose questions are not independent: the cluster bootstrap (Davison and Hinkley 1997, 3.8).

Questions about one picture, or one question's rotations, are right or wrong together. Whole clusters are drawn with
replacement, and the score is computed again; the 2.5 and 97.5 percentiles of the draws are the interval. A score is a
mean of components, a component a ratio of sums over clusters: one component for an accuracy, three for the mean of
aAcc, fAcc and qAcc, one a category for a macro mean. Seeded: the same records give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grace_vlm.evals.statistics import wilson_interval

Entry = tuple[str, float, float]
"""(cluster, value of one unit in [0, 1], its weight in the mean)."""
NUM_RESAMPLES = 1000
_CHUNK_DRAWS = 4_000_000


def cluster_interval(components: Sequence[Sequence[Entry]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of the components' means.

    Where all are right, or all wrong, draws have no spread: then it is Wilson's interval of that many clusters.
    """
    values, counts = _sums(components)
    num_clusters = len(counts)
    if num_clusters == 0 or not counts.any():
        return 0.0, 1.0
    if np.array_equal(values, counts) or not values.any():
        return wilson_interval(num_clusters if values.any() else 0, num_clusters)
    generator = np.random.default_rng(seed)
    draws = []
    per_chunk = max(1, _CHUNK_DRAWS // num_clusters)
    for start in range(0, NUM_RESAMPLES, per_chunk):
        num = min(per_chunk, NUM_RESAMPLES - start)
        drawn = generator.integers(num_clusters, size=(num, num_clusters))
        offsets = drawn + num_clusters * np.arange(num)[:, None]
        weights = np.bincount(offsets.ravel(), minlength=num * num_clusters).reshape(num, num_clusters)
        totals, sums = weights @ counts, weights @ values
        # A component that no drawn cluster has says nothing in that draw.
        ratios = np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)
        draws.append(ratios.sum(axis=1) / np.maximum(1, (totals > 0).sum(axis=1)))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return float(low), float(high)


def _sums(components: Sequence[Sequence[Entry]]) -> tuple[np.ndarray, np.ndarray]:
    """(clusters, components): weighted sum of values, and sum of weights."""
    names = sorted({cluster for component in components for cluster, _, _ in component})
    number = {name: index for index, name in enumerate(names)}
    values, counts = np.zeros((len(names), len(components))), np.zeros((len(names), len(components)))
    for column, component in enumerate(components):
        for cluster, value, weight in component:
            values[number[cluster], column] += weight * value
            counts[number[cluster], column] += weight
    return values, counts
