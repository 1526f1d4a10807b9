"""CKA between states: 1 for what is the same up to a rotation, the loss's own for the rest."""

from __future__ import annotations

import math

import pytest
import torch

from grace_vlm.evals.why.relation import Relation, cka_matrix, matched_states
from grace_vlm.losses.rcka import relational_cka_sum


def features(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(features(d, d, 9))[0]


def test_rotated_and_scaled_features_are_the_same() -> None:
    x = features(20, 8, 0)
    found = cka_matrix([x, 3 * x @ rotation(8)], [x, torch.cat([x @ rotation(8), torch.zeros(20, 4).double()], dim=1)])
    torch.testing.assert_close(found, torch.ones(2, 2, dtype=torch.float64))


def test_it_is_the_losss_number() -> None:
    ours, theirs = [features(15, 6, s) for s in (1, 2, 3)], [features(15, 9, s) for s in (4, 5)]
    found = cka_matrix(ours, theirs)
    for i, own in enumerate(ours):
        for j, other in enumerate(theirs):
            loss, _ = relational_cka_sum(own, other, [15])
            assert float(found[i, j]) == pytest.approx(1 - float(loss), abs=1e-12)


def test_the_mean_over_pictures() -> None:
    lengths = [9, 2, 12]
    ours, theirs = [features(23, 5, s) for s in (1, 2)], [features(23, 7, s) for s in (3, 4, 5)]
    relation = Relation()
    relation.add([x[:11] for x in ours], [x[:11] for x in theirs], lengths[:2])
    relation.add([x[11:] for x in ours], [x[11:] for x in theirs], lengths[2:])
    found = relation.summary()
    assert found["num_pictures"] == 2, "a picture of two tokens has no part"
    loss, count = relational_cka_sum(ours[0], theirs[1], lengths)
    assert int(count) == 2
    assert found["matrix"][0][1] == pytest.approx(1 - float(loss) / 2, abs=1e-6)
    assert found["tapped"] == found["matrix"][0][1]
    assert [(m["student"], m["teacher"]) for m in found["matched"]] == [(0, 0), (1, 2)]


def test_a_state_without_spread_is_no_number() -> None:
    flat = torch.ones(6, 4)
    relation = Relation()
    relation.add([flat, features(6, 4, 0)], [features(6, 4, 1)], [6])
    matrix = relation.summary()["matrix"]
    assert matrix[0][0] is None
    assert matrix[1][0] is not None
    assert not math.isnan(matrix[1][0])
    assert Relation().summary()["matrix"] == []


def test_states_at_the_same_share_of_the_depth() -> None:
    assert matched_states(5, 6) == [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5)]
    assert matched_states(29, 37)[-1] == (28, 36)
    assert matched_states(3, 3) == [(0, 0), (1, 1), (2, 2)]
