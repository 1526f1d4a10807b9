"""The random generators go on where they were."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from grace_vlm.checkpoint import capture_rng, restore_rng
from grace_vlm.errors import CheckpointError


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    state = capture_rng()
    yield
    restore_rng(state)


def draw() -> list[Any]:
    """From every generator, through the kinds of draw that keep hidden state (the second gaussian)."""
    drawn = [random.random(), random.gauss(0, 1), random.sample(range(100), 5)]
    drawn += [np.random.rand(3).tolist(), np.random.randn(), np.random.permutation(9).tolist()]
    drawn += [torch.rand(3).tolist(), torch.randn(17).tolist(), torch.randperm(9).tolist()]
    if torch.cuda.is_available():
        drawn += [torch.rand(3, device=f"cuda:{d}").tolist() for d in range(torch.cuda.device_count())]
    return drawn


@pytest.mark.parametrize("num_before", [0, 1, 2, 7])
def test_the_same_draws_follow(num_before: int) -> None:
    for _ in range(num_before):  # odd and even: with and without a gaussian kept back
        random.gauss(0, 1)
        np.random.randn()
        torch.randn(1)
    state = json.loads(json.dumps(capture_rng(), allow_nan=False))
    first = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != first
    restore_rng(state)
    assert [draw() for _ in range(3)] == first


@pytest.mark.parametrize("part", ["python", "numpy", "torch"])
def test_every_part_matters(part: str) -> None:
    """Keeping one generator's present state in place of the captured one changes the draws."""
    state = capture_rng()
    first = draw()
    restore_rng({**state, part: capture_rng()[part]})
    assert draw() != first


@pytest.mark.parametrize(
    ("part", "value"),
    [("python", {}), ("torch", "zz"), ("torch", "00"), ("numpy", {"key": "0", "pos": 1}), ("cuda", None)],
)
def test_a_damaged_state_is_one_line(part: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^the random state of the checkpoint is damaged") as caught:
        restore_rng({**capture_rng(), part: value})
    assert "\n" not in str(caught.value)


def test_another_number_of_gpus_is_refused() -> None:
    state = capture_rng()
    with pytest.raises(CheckpointError, match=r"the random state is of \d+ GPUs, this machine has \d+; resume on as"):
        restore_rng({**state, "cuda": [*state["cuda"], "00"]})
