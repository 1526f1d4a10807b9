"""The adaptive weight: recursion, bounds, what is in force when, resume."""

from __future__ import annotations

import math
import random

import pytest

from grace_vlm.errors import CheckpointError, ConfigError, NonFiniteError
from grace_vlm.losses.controller import AdaptiveWeight


def test_recursion_written_out() -> None:
    weight = AdaptiveWeight(initial=0.5, minimum=0.1, maximum=1.0, target=3.0, step_size=0.01, ema_decay=0.9)
    assert weight.value == 0.5  # the first step runs with the initial weight
    assert weight.update(5.0) == pytest.approx(0.5 + 0.01 * (5.0 - 3.0))  # the average starts at the first value
    ema = 0.9 * 5.0 + 0.1 * 1.0
    assert weight.update(1.0) == pytest.approx(0.52 + 0.01 * (ema - 3.0))
    assert weight.ema == pytest.approx(ema)
    ema = 0.9 * ema + 0.1 * 7.0
    expected = 0.52 + 0.01 * (4.6 - 3.0) + 0.01 * (ema - 3.0)
    assert weight.update(7.0) == pytest.approx(expected)
    assert weight.value == pytest.approx(expected)


def test_a_measurement_is_in_force_from_the_next_step_on() -> None:
    weight = AdaptiveWeight()
    used = []
    for measured in (36.0, 36.0, 36.0):
        used.append(weight.value)  # what every micro-batch of the step sees
        weight.update(measured)
    assert used[0] == 0.5
    assert used[1] == pytest.approx(0.5 + 0.003 * 33)
    assert used[2] == pytest.approx(0.5 + 2 * 0.003 * 33)


def test_weight_stays_within_its_bounds_and_can_leave_them() -> None:
    weight = AdaptiveWeight(ema_decay=0.0, step_size=0.1)
    for _ in range(50):
        weight.update(40.0)
    assert weight.value == 1.0
    assert weight.update(1.0) == pytest.approx(1.0 - 0.2)  # no wind-up behind the bound
    for _ in range(50):
        weight.update(0.0)
    assert weight.value == 0.1
    assert weight.update(4.0) == pytest.approx(0.2)


def test_random_walk_never_leaves_the_bounds() -> None:
    rng = random.Random(0)
    weight = AdaptiveWeight(step_size=0.5)
    for _ in range(2000):
        assert 0.1 <= weight.update(rng.uniform(0, 50)) <= 1.0


def test_state_goes_round_and_continues_bit_for_bit() -> None:
    rng = random.Random(1)
    measured = [rng.uniform(0, 8) for _ in range(40)]
    straight = AdaptiveWeight()
    values = [straight.update(m) for m in measured]
    first = AdaptiveWeight()
    head = [first.update(m) for m in measured[:17]]
    second = AdaptiveWeight(initial=0.9)
    second.load_state_dict(first.state_dict())
    assert head + [second.update(m) for m in measured[17:]] == values


def test_state_before_the_first_step_has_no_average() -> None:
    weight = AdaptiveWeight(initial=0.3)
    assert weight.state_dict() == {"value": 0.3, "ema": None}
    other = AdaptiveWeight()
    other.load_state_dict(weight.state_dict())
    assert other.update(5.0) == pytest.approx(0.3 + 0.003 * 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_changes_nothing(bad: float) -> None:
    weight = AdaptiveWeight()
    weight.update(4.0)
    before = weight.state_dict()
    with pytest.raises(NonFiniteError) as caught:
        weight.update(bad)
    assert str(caught.value) == f"the adaptive weight was given {bad}; weights are those of before the step"
    assert weight.state_dict() == before


def test_a_start_outside_the_bounds_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        AdaptiveWeight(initial=2.0)
    assert str(caught.value) == "adaptive weight starts at 2.0; expected within [0.1, 1.0]"


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_a_decay_outside_its_range_is_an_error(decay: float) -> None:
    with pytest.raises(ConfigError) as caught:
        AdaptiveWeight(ema_decay=decay)
    assert str(caught.value) == f"ema_decay is {decay}; expected a number in [0, 1)"


@pytest.mark.parametrize(
    "state", [{}, {"value": 0.5}, {"value": None, "ema": None}, {"value": 1.0, "ema": 1.0, "x": 1.0}]
)
def test_a_state_that_lacks_a_key_is_an_error(state: dict[str, float | None]) -> None:
    with pytest.raises(CheckpointError) as caught:
        AdaptiveWeight().load_state_dict(state)
    assert str(caught.value) == f"adaptive weight state has {sorted(state)}; expected ['ema', 'value']"
