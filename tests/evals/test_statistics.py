"""Intervals and tests against exact counting and published values."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from grace_vlm.evals.statistics import (
    Flips,
    disagreement_rate,
    flips,
    holm,
    mcnemar_p,
    paired_difference,
    wilson_interval,
)


@pytest.mark.parametrize("correct_of", [(0, 10), (1, 10), (81, 263), (2000, 2000), (1, 1), (500, 1000)])
def test_wilson_bounds_solve_the_score_equation(correct_of: tuple[int, int]) -> None:
    """At each bound p0, |p - p0| is exactly 1.96 of p0's own standard errors; 0 and 1 end the range."""
    correct, total = correct_of
    p = correct / total
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= p + 1e-15
    assert p - 1e-15 <= high <= 1.0
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(p - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / total), rel=1e-9)


def test_wilson_of_a_published_example() -> None:
    """Newcombe 1998, table I, method 3: 81/263 -> 0.2553 to 0.3662; 0/20 -> 0 to 0.1611; 15/148 -> 0.0624 to 0.1605."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_wilson_without_data_knows_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def exact_p(only_a: int, only_b: int) -> float:
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1))
    return float(min(Fraction(1), 2 * tail))


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    random.Random(0).shuffle(pairs)
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 1), (1, 1), (5, 0), (0, 12), (10, 20), (37, 59), (400, 521), (1000, 1000)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    a, b = outcomes(50, only_a, only_b, 7)
    assert mcnemar_p(a, b) == pytest.approx(exact_p(only_a, only_b), rel=1e-9)
    assert mcnemar_p(b, a) == mcnemar_p(a, b)


def test_mcnemar_of_equal_models_is_one() -> None:
    assert mcnemar_p([True, False, True], [True, False, True]) == 1.0
    assert mcnemar_p([], []) == 1.0


def test_mcnemar_of_thousands_of_differences_does_not_overflow() -> None:
    a, b = outcomes(0, 9000, 1000, 0)
    assert 0.0 <= mcnemar_p(a, b) < 1e-100


def test_mcnemar_of_a_published_example() -> None:
    """Fagerland, Lydersen and Laake 2013, table 1 (airway hyper-responsiveness, Bentur et al. 2009): of 21 children 7
    changed one way and 1 the other; exact conditional p = 0.070."""
    a, b = outcomes(1, 1, 7, 12)
    assert mcnemar_p(a, b) == pytest.approx(0.0703, abs=5e-5)


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="paired test on 2 and 3 outcomes"):
        mcnemar_p([True, True], [True, True, False])


def test_paired_difference_by_counting() -> None:
    a, b = outcomes(60, 25, 10, 5)
    mean, low, high = paired_difference(a, b)
    assert mean == pytest.approx(0.15)
    variance = (25 * (1 - 0.15) ** 2 + 10 * (-1 - 0.15) ** 2 + 65 * 0.15**2) / 99
    half = 1.959963984540054 * math.sqrt(variance / 100)
    assert (low, high) == pytest.approx((0.15 - half, 0.15 + half))


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    """Models that agree on most questions: pairing is what makes a small loss visible."""
    a, b = outcomes(1500, 40, 10, 450)
    mean, low, high = paired_difference(a, b)
    assert low > 0
    interval = wilson_interval(1540, 2000)
    assert high - low < interval[1] - interval[0]
    assert mean == pytest.approx(0.015)


# --- several tests ---


def holm_rejects(p_values: list[float], level: float) -> list[bool]:
    """The procedure as Holm states it: step through the sorted p values, stop at the first that is too large."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    rejected = [False] * len(p_values)
    for step, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - step):
            break
        rejected[index] = True
    return rejected


def test_holm_rejects_what_the_stepwise_procedure_rejects() -> None:
    rng = random.Random(0)
    for _ in range(300):
        p_values = [rng.random() ** 3 for _ in range(rng.randint(1, 8))]
        adjusted = holm(p_values)
        for level in (0.01, 0.05, 0.2):
            assert [p <= level for p in adjusted] == holm_rejects(p_values, level)


def test_holm_of_a_published_example() -> None:
    """Four hypotheses with p of 0.01, 0.04, 0.03, 0.005: at 0.05 the first and the last are rejected. R's
    ``p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")`` gives 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_of_one_none_and_ties() -> None:
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([1.0, 0.9]) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"1\.2 is no p value"):
        holm([0.1, 1.2])
    with pytest.raises(ValueError, match="nan is no p value"):
        holm([math.nan])


# --- what differs ---


def test_disagreement_counts_answers_and_not_outcomes() -> None:
    """Both wrong with different letters disagree, though McNemar does not see it."""
    assert disagreement_rate("ABCD", "ABDD") == 0.25
    assert disagreement_rate(["B", None, "A"], ["C", "A", "A"]) == pytest.approx(2 / 3)
    assert mcnemar_p([False, False], [False, False]) == 1.0
    with pytest.raises(ValueError, match="paired comparison of 1 and 2 outcomes"):
        disagreement_rate("A", "AB")
    with pytest.raises(ValueError, match="a disagreement rate of no answers"):
        disagreement_rate([], [])


def test_flips_are_named_and_are_mcnemars_counts() -> None:
    a, b = outcomes(30, 9, 4, 20)
    keys = [f"q{number}" for number in range(63)]
    found = flips(keys, a, b)
    assert (len(found.lost), len(found.gained)) == (9, 4)
    assert list(found.lost) == [key for key in keys if a[int(key[1:])] and not b[int(key[1:])]]
    assert flips(keys, b, a) == Flips(found.gained, found.lost)
    assert exact_p(len(found.lost), len(found.gained)) == pytest.approx(mcnemar_p(a, b))
    with pytest.raises(ValueError, match="paired comparison of 2 and 1 outcomes"):
        flips(["x", "y"], [True, True], [True])
