"""Schedule, groups, clip and resume of the optimizer; one step against Adam written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from grace_vlm.models.adapter import linear_shapes
from grace_vlm.quant.plan import make_plan
from grace_vlm.train.config import OptimConfig
from grace_vlm.train.masters import Masters
from grace_vlm.train.optim import Optimizer, is_decayed, learning_rate_factor


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 16)
        self.proj, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)


def make(**settings: Any) -> tuple[Masters, Optimizer]:
    """``settings`` of the optimizer, and ``scheme``."""
    model, scheme = Small(), settings.pop("scheme", "w4g16")
    masters = Masters(model, make_plan(linear_shapes(model), "proj", scheme))
    options = {"num_steps": 10, "warmup_fraction": 0.0, **settings}
    return masters, Optimizer(masters, OptimConfig(**options))


def set_gradients(optimizer: Optimizer, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in optimizer.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * size


def test_schedule_rises_then_follows_a_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0 < factors[99] < 0.001
    assert learning_rate_factor(100, 100, 0.1) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate_factor(3, 100, 0.1) == pytest.approx(0.4)


@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0.0), (1, 0.03), (1, 1.0), (7, 1.0), (3, 0.5)])
def test_schedule_of_short_runs_is_finite_and_never_stands_still(num_steps: int, warmup: float) -> None:
    factors = [learning_rate_factor(step, num_steps, warmup) for step in range(num_steps)]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert math.ceil(warmup * num_steps) == 0 or factors[0] == pytest.approx(1 / math.ceil(warmup * num_steps))


def test_only_weights_of_linears_are_decayed() -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight", "visual.pos_embed.weight")
    assert not any(is_decayed(name, torch.zeros(2, 2)) for name in names)
    assert not is_decayed("layers.0.norm.weight", torch.zeros(2))
    assert not is_decayed("layers.0.proj.bias", torch.zeros(2))
    assert is_decayed("layers.0.proj.weight", torch.zeros(2, 2))


def test_decay_moves_the_linear_weights_alone() -> None:
    masters, optimizer = make(learning_rate=0.1, scale_learning_rate=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in optimizer.parameters}
    for _, parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0)
    after = dict(optimizer.parameters)
    for name, start in before.items():
        expected = start * (1 - 0.1 * 0.5) if name == "proj.weight" else start
        assert torch.allclose(after[name], expected, rtol=1e-6, atol=0), name
    assert "proj.weight.log_scale" in after
    assert sum(1 for _ in masters.masters()) + 1 == len(after)


def test_two_steps_equal_adam_written_out() -> None:
    settings = {"learning_rate": 0.01, "scale_learning_rate": 0.2, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}
    _, optimizer = make(**settings, epsilon=1e-6)
    values = {name: p.detach().double().clone() for name, p in optimizer.parameters}
    moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in values.items()}
    for step in range(2):
        set_gradients(optimizer, step)
        factor = 0.5 * (1 + math.cos(math.pi * step / 10))
        for name, parameter in optimizer.parameters:
            assert parameter.grad is not None
            g = parameter.grad.double()
            m, v = moments[name]
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            moments[name] = (m, v)
            rate = (0.2 if name.endswith("log_scale") else 0.01) * factor
            decay = 0.1 if name == "proj.weight" else 0.0
            values[name] = values[name] * (1 - rate * decay)
            m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
            values[name] = values[name] - rate * m_hat / (v_hat.sqrt() + 1e-6)
        assert optimizer.step(step) == pytest.approx(0.01 * factor)
        assert all(p.grad is None for _, p in optimizer.parameters)
    for name, parameter in optimizer.parameters:
        assert torch.allclose(parameter.double(), values[name], rtol=1e-5, atol=1e-7), name


def test_clip_is_global_over_weights_and_scales() -> None:
    _, optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0, size=3.0)
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for _, p in optimizer.parameters if p.grad is not None))
    before = [p.grad.clone() for _, p in optimizer.parameters if p.grad is not None]
    optimizer.clip(torch.tensor(norm))
    after = [p.grad for _, p in optimizer.parameters if p.grad is not None]
    assert all(torch.allclose(a, b / norm, rtol=1e-4) for a, b in zip(after, before, strict=True))
    small = 1e-3
    set_gradients(optimizer, 0, size=small)
    before = [p.grad.clone() for _, p in optimizer.parameters if p.grad is not None]
    optimizer.clip(torch.nn.utils.get_total_norm(before))
    after = [p.grad for _, p in optimizer.parameters if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_scale_rate_of_zero_keeps_the_scales() -> None:
    masters, optimizer = make(scale_learning_rate=0.0)
    before = [p.detach().clone() for _, p in masters.log_scales()]
    set_gradients(optimizer, 1)
    optimizer.step(0)
    assert all(torch.equal(p, b) for (_, p), b in zip(masters.log_scales(), before, strict=True))


def test_resume_continues_bit_for_bit() -> None:
    straight_masters, straight = make(learning_rate=0.05)
    assert straight.state_dict() == {}
    for step in range(3):
        set_gradients(straight, step)
        straight.step(step)
    saved = {key: value.clone() for key, value in straight.state_dict().items()}
    masters, optimizer = make(learning_rate=0.05)
    masters.load_state_dict(
        {name: p.detach().clone() for name, p in straight_masters.masters()},
        {name: p.detach().clone() for name, p in straight_masters.log_scales()},
    )
    optimizer.load_state_dict(saved)
    for step in range(3, 6):
        for one in (straight, optimizer):
            set_gradients(one, step)
            one.step(step)
    resumed = dict(optimizer.parameters)
    assert all(torch.equal(p, resumed[name]) for name, p in straight.parameters)
    ours, theirs = straight.state_dict(), optimizer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {key.rpartition("#")[2] for key in saved} == {"step", "exp_avg", "exp_avg_sq"}


def state_of(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that a step may change, copied."""
    weights = {name: p.detach().clone() for name, p in optimizer.parameters}
    return {**weights, **{key: value.clone() for key, value in optimizer.state_dict().items()}}


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_guard_that_is_up_leaves_every_byte_and_one_that_is_down_does_nothing(
    moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grace_vlm.train.optim.MIN_ELEMENTS", 100)
    _, guarded = make(moments=moments)
    _, plain = make(moments=moments)
    flag = torch.zeros(())
    guarded.guard(flag)
    for step in range(2):
        for one in (guarded, plain):
            set_gradients(one, step)
            one.step(step)
    expected = state_of(plain)
    assert all(torch.equal(value, expected[key]) for key, value in state_of(guarded).items())
    in_bytes = {key for key in expected if key.endswith("#m")}
    assert in_bytes == ({"proj.weight#m", "embed_tokens.weight#m", "lm_head.weight#m"} if moments == "8bit" else set())
    flag.fill_(1.0)
    set_gradients(guarded, 9, size=math.nan)
    guarded.step(2)
    after = state_of(guarded)
    assert after.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in after.items())
    assert all(p.grad is None for _, p in guarded.parameters)


def test_all_moments_may_be_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No log-scale and nothing small: torch's optimizer has nothing to do."""
    monkeypatch.setattr("grace_vlm.train.optim.MIN_ELEMENTS", 1)
    _, optimizer = make(scheme="bf16", moments="8bit", learning_rate=0.1)
    optimizer.guard(torch.zeros(()))
    before = state_of(optimizer)
    set_gradients(optimizer, 0)
    optimizer.step(0)
    state = optimizer.state_dict()
    assert {key.rpartition("#")[2] for key in state} == {"m", "v", "scale"}
    assert all(not torch.equal(p, before[name]) for name, p in optimizer.parameters)
    optimizer.load_state_dict({key: value.clone() for key, value in state.items()})
