"""Student's t against its tables and against a draw."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from grace_vlm.evals.student_t import t_interval, t_p, t_quantile, t_test, welch


# Two-sided 95 % and 99 % points as any table has them.
@pytest.mark.parametrize(
    ("degrees", "at_95", "at_99"),
    [(1, 12.7062, 63.6567), (2, 4.3027, 9.9248), (4, 2.7764, 4.6041), (9, 2.2622, 3.2498), (120, 1.9799, 2.6174)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, at_95: float, at_99: float) -> None:
    assert t_quantile(degrees) == pytest.approx(at_95, abs=5e-5)
    assert t_quantile(degrees, 0.99) == pytest.approx(at_99, abs=5e-5)


def test_one_and_two_degrees_have_closed_forms() -> None:
    for t in (0.01, 0.5, 1.0, 3.0, 50.0):
        assert t_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-10)
        assert t_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
        assert t_p(-t, 2) == t_p(t, 2)
    assert t_p(0.0, 3) == 1.0


def test_two_samples_as_in_student_1908() -> None:
    """The sleep of ten patients under two drugs, unpaired; what R's t.test says of it."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    other = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert welch(one, other) == pytest.approx((-3.3654832, 0.2054832, 0.07939414), abs=1e-6)
    assert welch(other, one)[:2] == pytest.approx((-0.2054832, 3.3654832), abs=1e-6)
    for few in ([1.0], [1.0, 1.0]):
        assert all(math.isnan(value) for value in welch(few, few))


def test_an_interval_covers_as_often_as_it_says() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(4000):
        low, high = t_interval([draw.gauss(3.0, 2.0) for _ in range(5)])
        covered += low < 3.0 < high
    # 95 % of 4,000 with a standard error of 0.34 points.
    assert 0.938 < covered / 4000 < 0.962


def test_a_test_and_an_interval_agree() -> None:
    values = [0.4, 1.1, 0.2, 0.9, 0.7]
    mean = statistics.mean(values)
    edge = t_interval(values)[0]
    assert t_test([value - edge for value in values]) == pytest.approx(0.05, rel=1e-6)
    assert t_test([value - mean for value in values]) == pytest.approx(1.0, abs=1e-6)


def test_what_has_no_spread() -> None:
    assert math.isnan(t_test([1.0]))
    assert math.isnan(t_interval([1.0])[0])
    assert t_test([0.0, 0.0]) == 1.0
    assert math.isnan(t_test([2.0, 2.0]))
