"""Shares of several processes made whole and shared out anew, for any two numbers of processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from grace_vlm.checkpoint.store import TrainState
from grace_vlm.errors import CheckpointError
from grace_vlm.quant.plan import PlanEntry, QuantPlan
from grace_vlm.quant.scheme import QuantScheme
from grace_vlm.train.config import OptimConfig
from grace_vlm.train.masters import Masters
from grace_vlm.train.optim import Optimizer
from grace_vlm.train.ranks import Going, Ranks
from grace_vlm.train.reshard import shared_out


def one_of(monkeypatch: pytest.MonkeyPatch, index: int, count: int, moments: str, rows: int) -> tuple[Masters, Any]:
    """Process ``index`` of ``count`` over the same model, as it stands before it has said anything to the others."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(128, rows, bias=False), "norm": nn.LayerNorm(6)})
    ranks = Ranks(torch.device("cpu"))
    ranks.index, ranks.count = index, count
    # Nothing is exchanged: each writes the leaves of its own rows.
    monkeypatch.setattr(ranks, "sum_", lambda tensor: tensor)
    monkeypatch.setattr(ranks, "start_gather", lambda wholes, shares: Going(ranks, ()))
    plan = QuantPlan((PlanEntry("proj", rows, 128, QuantScheme(4, 32)),))
    masters = Masters(model, plan, ranks=ranks)
    return masters, Optimizer(masters, OptimConfig(num_steps=9, moments=moments))  # type: ignore[arg-type]


def state_of(masters: Masters, optimizer: Any) -> TrainState:
    """What is told apart by its values: every moment from the number of its element in the whole."""
    for name, parameter in optimizer.parameters:
        share = masters.leaf_of(name.removesuffix(".log_scale"))[1]
        first = 0 if share is None else share.start * (parameter[0].numel() if parameter.ndim > 1 else 1)
        parameter.grad = torch.arange(first, first + parameter.numel(), dtype=torch.float32).view(parameter.shape) + 1
    optimizer.step(0)
    scales = dict(masters.log_scales())
    return TrainState(3, dict(masters.masters()), scales, optimizer.state_dict(), {}, {}, {}, {})


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 1), (3, 2), (2, 3)])
def test_shares_go_from_any_number_to_any_other(
    monkeypatch: pytest.MonkeyPatch, moments: str, before: int, after: int
) -> None:
    given = [state_of(*one_of(monkeypatch, index, before, moments, 120)) for index in range(before)]
    wanted = [state_of(*one_of(monkeypatch, index, after, moments, 120)) for index in range(after)]
    for index in range(after):
        masters, _ = one_of(monkeypatch, index, after, moments, 120)
        found = shared_out(given, masters)
        for field in ("masters", "log_scales", "optimizer_tensors"):
            theirs = getattr(wanted[index], field)
            assert getattr(found, field).keys() == theirs.keys()
            for name, tensor in getattr(found, field).items():
                assert tensor.shape == theirs[name].shape, name
                if not name.endswith(("#m", "#v")):  # a byte's rounding hangs on its place among a process's own
                    # To one part in 10^6: the same element may be at a vector's end here and inside one there.
                    assert torch.allclose(tensor, theirs[name], rtol=1e-6, atol=0), name


def test_a_matrix_that_no_number_divides_is_whole_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [state_of(*one_of(monkeypatch, index, 5, "fp32", 116)) for index in range(5)]
    masters, _ = one_of(monkeypatch, 2, 4, "fp32", 116)
    found = shared_out(given, masters)
    assert torch.equal(found.masters["proj.weight"], given[0].masters["proj.weight"][58:87])


def test_blocks_of_byte_moments_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [state_of(*one_of(monkeypatch, index, 1, "8bit", 117)) for index in range(1)]
    masters, _ = one_of(monkeypatch, 1, 9, "8bit", 117)  # 13 rows of 128: six blocks and a half
    with pytest.raises(CheckpointError, match="which another number of processes would cut; resume on as many"):
        shared_out([dataclasses.replace(given[0])], masters)
