"""Which tokens are first of an answer, of which row, and what is said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grace_vlm.data.collate import Batch, collate
from grace_vlm.data.encode import Sample
from grace_vlm.evals.why.certainty import NUM_GATE_BINS, Certainty, error_by_entropy, gates


def sample(labels: list[int]) -> Sample:
    ids = np.array([max(label, 0) for label in labels])
    none = np.empty(0, dtype=np.int64)
    return Sample(0, "r", ids, np.array(labels), np.zeros((3, len(labels)), dtype=np.int64), (), none)


def batch() -> Batch:
    """Two rows: one with two answers of two tokens and one, one with an answer of three."""
    return collate([sample([-100, -100, 1, 2, -100, 3]), sample([-100, 2, 2, 0])], [], [], 0, "packed")


def test_first_tokens_and_rows() -> None:
    # The head is the identity over four words: states are logits.
    targets = batch().targets
    assert targets.tolist() == [1, 2, 3, 2, 2, 0]
    logits = 40.0 * torch.nn.functional.one_hot(torch.tensor([1, 0, 3, 0, 2, 0]), 4).float()
    certainty = Certainty(4)
    certainty.add(batch(), logits, torch.eye(4))
    certainty.add(batch(), torch.zeros(6, 4), torch.eye(4))
    found = certainty.summary()
    everything, first = found["entropy"]["all"], found["entropy"]["first"]
    assert (everything["num_tokens"], everything["num_rows"]) == (12, 4)
    # Of the first batch tokens 1 and 3 are wrong, of the second all but the one whose target is word 0.
    assert everything["error_rate"] == pytest.approx((2 + 5) / 12)
    assert (first["num_tokens"], first["num_rows"]) == (6, 4)
    assert first["error_rate"] == pytest.approx((1 + 3) / 6)
    assert found["gate"]["mean"] == pytest.approx((1 + math.exp(-1)) / 2)


def test_errors_that_follow_the_entropy() -> None:
    """With a probability of error that is half of the entropy, the line through the bins says so."""
    draw = np.random.default_rng(0)
    entropy = draw.random(40_000) * 2
    wrong = (draw.random(40_000) < entropy / 2).astype(int)
    found = error_by_entropy(entropy.tolist(), wrong.tolist(), list(range(40_000)))
    # Var(H) = 1/3, Cov(H, wrong) = 1/6, Var(wrong) = 1/4: r = 1 / sqrt(3).
    assert found["pearson"]["r"] == pytest.approx(1 / math.sqrt(3), abs=0.01)
    for kind in ("equal_counts", "equal_widths"):
        assert len(found[kind]["bins"]) == 10
        assert found[kind]["line"]["slope"] == pytest.approx(0.5, abs=0.02)
        assert found[kind]["line"]["intercept"] == pytest.approx(0.0, abs=0.02)
        assert found[kind]["line"]["r_squared"] > 0.995


def test_nothing_to_look_at() -> None:
    found = Certainty(4).summary()
    assert found["entropy"]["all"]["num_tokens"] == 0
    assert found["entropy"]["all"]["error_rate"] is None
    assert found["gate"]["mean"] is None


def test_the_gates_ends() -> None:
    entropy = torch.tensor([0.0, math.log(100), math.log(100) / 2])
    found = gates(entropy, torch.tensor([False, True, False]), 100)
    assert sum(found["counts"]) == 3
    assert found["counts"][-1] == found["counts"][0] == 1
    assert len(found["edges"]) == NUM_GATE_BINS + 1
    assert found["mean_wrong"] == pytest.approx(math.exp(-1), rel=1e-6)
    assert found["mean_right"] == pytest.approx((1 + math.exp(-0.5)) / 2, rel=1e-6)
    assert found["quantiles"]["0.5"] == pytest.approx(math.exp(-0.5), rel=1e-6)
