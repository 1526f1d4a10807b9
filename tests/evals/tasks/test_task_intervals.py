"""The cluster bootstrap: repeatable, wide where clusters are, and as Wilson where there is nothing to draw from."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from grace_vlm.evals.bootstrap import Entry, components_interval
from grace_vlm.evals.statistics import wilson_interval


def entries(num_clusters: int, per_cluster: int, seed: int = 0) -> list[Entry]:
    """Right or wrong by the cluster."""
    draw = random.Random(seed)
    values = [float(draw.random() < 0.6) for _ in range(num_clusters)]
    return [(str(cluster), value, 1.0) for cluster, value in enumerate(values) for _ in range(per_cluster)]


def test_rows_that_stand_alone_have_wilsons_width() -> None:
    rows = entries(400, 1)
    right = int(sum(value for _, value, _ in rows))
    assert components_interval([rows]) == pytest.approx(wilson_interval(right, 400), abs=0.012)


def test_copies_of_a_row_do_not_make_it_narrower() -> None:
    assert components_interval([entries(200, 1)]) == pytest.approx(components_interval([entries(200, 5)]))


def test_the_width_is_that_of_the_clusters_spread() -> None:
    """Half-width of a mean of cluster means: 1.96 s / sqrt(n), for clusters of one size."""
    draw = np.random.default_rng(1)
    shares = draw.integers(0, 5, 300) / 4
    rows = [(str(c), float(n < 4 * share), 1.0) for c, share in enumerate(shares) for n in range(4)]
    low, high = components_interval([rows])
    assert (high - low) / 2 == pytest.approx(1.96 * shares.std(ddof=1) / math.sqrt(300), rel=0.06)
    assert (high + low) / 2 == pytest.approx(shares.mean(), abs=0.003)


def test_a_mean_of_components_draws_them_together() -> None:
    """Twice the same component is that component; a component and its opposite is one half in every draw, which says
    nothing: then it is Wilson's interval of the groups."""
    rows = entries(100, 2)
    opposite = [(cluster, 1 - value, 1.0) for cluster, value, _ in rows]
    assert components_interval([rows, rows]) == pytest.approx(components_interval([rows]))
    groups = len({group for group, _, _ in rows})
    assert components_interval([rows, opposite]) == pytest.approx(wilson_interval(groups / 2, groups), abs=1e-6)


def test_a_weight_is_as_many_rows() -> None:
    rows = entries(100, 1)
    heavy = [(cluster, value, 1.0 + value) for cluster, value, _ in rows]
    assert components_interval([heavy]) == pytest.approx(
        components_interval([rows + [one for one in rows if one[1] == 1.0]])
    )


def test_the_same_records_give_the_same_interval() -> None:
    rows = entries(50, 3)
    assert components_interval([rows]) == components_interval([list(reversed(rows))])
    many = entries(1_000, 1)
    assert components_interval([many], seed=1) != components_interval([many])


def test_all_right_or_all_wrong_is_no_certainty() -> None:
    right = [(str(cluster), 1.0, 1.0) for cluster in range(10) for _ in range(3)]
    assert components_interval([right]) == wilson_interval(10, 10)
    assert components_interval([[(cluster, 0.0, 1.0) for cluster, _, _ in right]]) == wilson_interval(0, 10)
    assert components_interval([]) == (0.0, 1.0)
    assert components_interval([[]]) == (0.0, 1.0)


def test_many_clusters_go_in_stretches() -> None:
    """More clusters than one stretch of draws holds for all resamples."""
    low, high = components_interval([entries(9_000, 1)])
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.24 / 9_000), rel=0.1)
