"""Cluster bootstrap against enumeration of all resamples, against what clustering must do, and against chance."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest

from grace_vlm.evals.bootstrap import cluster_interval, group_totals, paired_cluster_interval, ratio_interval
from grace_vlm.evals.statistics import paired_difference, wilson_interval


def enumerated(totals: list[tuple[float, int]]) -> list[float]:
    """The means of all G^G equally likely resamples, sorted."""
    resamples = itertools.product(totals, repeat=len(totals))
    return sorted(sum(s for s, _ in drawn) / sum(m for _, m in drawn) for drawn in resamples)


@pytest.mark.parametrize(
    "outcomes",
    [
        {"a": [1, 1, 0], "b": [1], "c": [0, 0], "d": [1, 0, 0, 0], "e": [1, 1]},
        {"a": [1, 0], "b": [1, 1], "c": [0, 0], "d": [0, 1], "e": [1, 1], "f": [0]},
    ],
)
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_the_ends_are_quantiles_of_all_resamples(outcomes: dict[str, list[int]], confidence: float) -> None:
    """At a quantile of 200,000 draws, the exact distribution has just its share below and above."""
    correct = [bool(value) for values in outcomes.values() for value in values]
    groups = [name for name, values in outcomes.items() for _ in values]
    mean, low, high = cluster_interval(correct, groups, num_resamples=200_000, confidence=confidence)
    exact = enumerated([(sum(values), len(values)) for values in outcomes.values()])
    assert mean == pytest.approx(sum(correct) / len(correct))
    tail = (1 - confidence) / 2
    for end, share in ((low, tail), (high, 1 - tail)):
        below = sum(value < end - 1e-12 for value in exact) / len(exact)
        up_to = sum(value <= end + 1e-12 for value in exact) / len(exact)
        assert below - 0.005 <= share <= up_to + 0.005


def test_groups_of_one_are_the_ordinary_interval() -> None:
    rng = random.Random(0)
    correct = [rng.random() < 0.7 for _ in range(3000)]
    mean, low, high = cluster_interval(correct, range(3000))
    wilson = wilson_interval(sum(correct), 3000)
    assert mean == sum(correct) / 3000
    assert (low, high) == pytest.approx(wilson, abs=0.001)


def test_copies_of_a_question_add_no_knowledge() -> None:
    """Four equal answers a group: the interval is that of a quarter of the rows, twice as wide as it looks."""
    rng = random.Random(1)
    single = [rng.random() < 0.6 for _ in range(500)]
    copied, groups = [value for value in single for _ in range(4)], [n for n in range(500) for _ in range(4)]
    assert cluster_interval(copied, groups) == pytest.approx(cluster_interval(single, range(500)), abs=1e-12)
    _, low, high = cluster_interval(copied, groups)
    naive = wilson_interval(sum(copied), len(copied))
    assert (high - low) / (naive[1] - naive[0]) == pytest.approx(2.0, rel=0.05)


def test_order_and_names_change_no_digit() -> None:
    """Shards and batches hand rows over in any order."""
    rng = random.Random(2)
    rows = [(rng.random() < 0.5, rng.random() < 0.5, rng.randrange(60)) for _ in range(400)]
    expected = paired_cluster_interval(*zip(*rows, strict=True), seed=3)
    for _ in range(3):
        rng.shuffle(rows)
        renamed = [(a, b, f"figure {group}") for a, b, group in rows]
        assert paired_cluster_interval(*zip(*renamed, strict=True), seed=3) == expected
    assert paired_cluster_interval(*zip(*rows, strict=True), seed=4) != expected


def test_pairing_on_groups_of_one_is_the_paired_interval() -> None:
    rng = random.Random(4)
    a = [rng.random() < 0.8 for _ in range(2000)]
    b = [value if rng.random() < 0.95 else not value for value in a]
    mean, low, high = paired_cluster_interval(a, b, range(2000))
    assert (mean, low, high) == pytest.approx(paired_difference(a, b), abs=0.001)
    assert paired_cluster_interval(a, a, range(2000)) == (0.0, 0.0, 0.0)
    other = paired_cluster_interval(b, a, range(2000))
    assert (other[0], other[1], other[2]) == pytest.approx((-mean, -high, -low), abs=0.001)


def test_the_interval_covers_what_it_says() -> None:
    """Groups of five whose difficulty differs: of 200 samples, about 95 % of intervals hold the truth; the interval of
    independent rows does not."""
    generator = np.random.default_rng(5)
    covered = naive = 0
    for _ in range(200):
        chance = generator.beta(1.2, 0.8, size=120)
        correct = (generator.random((120, 5)) < chance[:, None]).ravel().tolist()
        groups = [n // 5 for n in range(600)]
        _, low, high = cluster_interval(correct, groups, num_resamples=600)
        covered += low <= 0.6 <= high
        low, high = wilson_interval(sum(correct), 600)
        naive += low <= 0.6 <= high
    assert 180 <= covered <= 198
    assert naive < 165


def test_several_ratios_move_together() -> None:
    """Rows and whole figures of one drawing: their mean against resampling by hand."""
    rng = random.Random(6)
    sets = {name: [[rng.random() < 0.7 for _ in range(3)] for _ in range(2)] for name in range(40)}
    rows = {name: (float(sum(map(sum, figures))), 6) for name, figures in sets.items()}
    whole = {name: (float(sum(map(all, figures))), 2) for name, figures in sets.items()}
    mean, low, high = ratio_interval([rows, whole], num_resamples=20_000)
    assert mean == pytest.approx((sum(s for s, _ in rows.values()) / 240 + sum(s for s, _ in whole.values()) / 80) / 2)
    generator = np.random.default_rng(7)
    table = np.array([[rows[name][0], whole[name][0]] for name in sets])
    drawn = table[generator.integers(40, size=(20_000, 40))].sum(1) / (240, 80)
    assert (low, high) == pytest.approx(np.quantile(drawn.mean(1), [0.025, 0.975]), abs=0.006)


def test_one_group_knows_nothing_of_others_and_none_is_an_error() -> None:
    assert cluster_interval([True, True, False], ["x"] * 3) == (pytest.approx(2 / 3), 0.0, 1.0)
    assert paired_cluster_interval([True, True], [True, False], ["x"] * 2) == (0.5, -1.0, 1.0)
    with pytest.raises(ValueError, match="an interval of no outcomes"):
        cluster_interval([], [])
    with pytest.raises(ValueError, match="zip"):
        cluster_interval([True], ["a", "b"])
    with pytest.raises(ValueError, match="measures of different groups"):
        ratio_interval([{"a": (1.0, 1)}, {"b": (1.0, 1)}])
    with pytest.raises(ValueError, match="a ratio with nothing in its denominator"):
        ratio_interval([{"a": (0.0, 0), "b": (0.0, 0)}])


def test_resamples_without_a_denominator_are_left_out() -> None:
    """Of two sets one has no figure: a quarter of the drawings has none at all, the others say 1/2."""
    measure = {"a": (1.0, 2), "b": (0.0, 0)}
    assert ratio_interval([measure]) == (0.5, 0.5, 0.5)


def test_sums_do_not_depend_on_the_order_of_rows() -> None:
    values = [0.1, 1e16, -1e16, 0.2]
    assert group_totals(values, "aaaa") == {"a": (math.fsum([0.1, 0.2]), 4)} == group_totals(values[::-1], "aaaa")


def test_fourteen_thousand_rows_take_no_time() -> None:
    rng = random.Random(8)
    correct, groups = [rng.random() < 0.7 for _ in range(14_233)], [n // 3 for n in range(14_233)]
    start = time.perf_counter()
    cluster_interval(correct, groups)
    assert time.perf_counter() - start < 2.0
