"""Embeddings whose gradient is added to a sum: autograd's own numbers, and no gradient of the table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from grace_vlm.models.look_up import look_up, sum_look_ups

IDS = torch.tensor([[3, 1, 3, 7], [0, 3, 2, 9]])


def model_of(table: nn.Embedding) -> Any:
    return SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(embed_tokens=table)))


@pytest.mark.parametrize("padding", [None, 3])
def test_the_sum_is_autograds_gradient(padding: int | None) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(11, 6, padding_idx=padding, dtype=torch.float64)
    by = torch.randn(2, 4, 6, dtype=torch.float64)
    (look_up(table, IDS) * by).sum().backward()
    assert table.weight.grad is not None
    expected, table.weight.grad = table.weight.grad, None

    before = torch.randn(11, 6, dtype=torch.float64)
    total = before.clone()
    sum_look_ups(model_of(table), lambda leaf: total if leaf is table.weight else None)
    rows = look_up(table, IDS)
    assert torch.equal(rows, table(IDS))
    (rows * by).sum().backward()
    assert table.weight.grad is None
    torch.testing.assert_close(total - before, expected)


def test_without_gradients_nothing_is_added() -> None:
    table, total = nn.Embedding(11, 6), torch.zeros(11, 6)
    sum_look_ups(model_of(table), lambda _: total)
    with torch.no_grad():
        assert not look_up(table, IDS).requires_grad
    assert not total.any()


def test_a_frozen_table_stays_as_it_is() -> None:
    table = nn.Embedding(11, 6).requires_grad_(False)
    sum_look_ups(model_of(table), lambda _: None)
    assert not look_up(table, IDS).requires_grad
