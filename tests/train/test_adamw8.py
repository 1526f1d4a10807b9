"""Byte moments follow FP32 Adam: in what an update is, over time, after a resume; and not at all when stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.formats.weights import open_weights
from grace_vlm.train.adamw8 import (
    BLOCK,
    LEVELS_M,
    LEVELS_V,
    MIN_ELEMENTS,
    AdamW8,
    ByteMoments,
    Rule,
    adamw8_,
    decode,
    encode,
    thresholds,
)
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import Run, train
from grace_vlm.train.record import read_metrics

NUM = 32 * BLOCK


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adamw8")
    write_rows(folder)
    write_models(folder)
    return folder


def recipe(folder: Path, **overrides: Any) -> Recipe:
    return recipe_from(recipe_tree(folder, **overrides), "test")


@pytest.mark.parametrize(("levels", "octaves"), [(LEVELS_M, 15), (LEVELS_V, 31)])
def test_what_is_stored_is_right_on_average_and_within_a_level(levels: int, octaves: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(-octaves * torch.rand(8, BLOCK, generator=generator))
    x[:, 0] = 1.0
    x[:, 1] = 0.0
    total = torch.zeros_like(x, dtype=torch.float64)
    for turn in range(1, 257):
        for_m, for_v = thresholds(0, 8, turn * 0x9E3779B9 & 0xFFFFFFFF, x.device)
        codes, scale = encode(x, for_m if levels == LEVELS_M else for_v, levels, keep=levels == LEVELS_V)
        assert int(codes.max()) == levels
        found = decode(codes, scale, levels)
        assert bool(((found - x).abs() <= 0.126 * x).all())
        total += found
    bias = (total / 256 - x) / x.clamp_min(1e-30)
    assert float(bias.abs().max()) < 0.03  # 256 draws of a number that is right to an eighth
    assert float(bias.mean().abs()) < 5e-4
    assert bool((found[:, 1] == 0).all())
    assert bool((found[:, 0] == 1).all())


def gradient(step: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randn(NUM, generator=generator)
    if kind == "spread":  # three decades inside every block
        drawn *= 10 ** (-3 * torch.rand(NUM, generator=torch.Generator().manual_seed(99)))
    if kind == "sparse":  # rows of an embedding: most have no gradient in a step
        drawn *= torch.rand(NUM, generator=generator) < 0.05
    return drawn


@pytest.mark.parametrize(("kind", "bound"), [("even", 0.15), ("spread", 0.15), ("sparse", 0.45)])
def test_updates_are_those_of_fp32_adam_up_to_rounding(kind: str, bound: float) -> None:
    """300 steps: the error of the whole update, and no weight that moves by more than FP32's farthest, doubled."""
    exact = torch.nn.Parameter(torch.zeros(NUM))
    adam = torch.optim.AdamW([exact], lr=1.0, weight_decay=0.0)
    ours, moments = torch.zeros(NUM), ByteMoments.zeros(exact)
    errors, farthest, farthest_exact = [], 0.0, 0.0
    for step in range(300):
        given = gradient(step, kind)
        before, before_exact = ours.clone(), exact.detach().clone()
        exact.grad = given.clone()
        adam.step()
        adamw8_(ours, given, moments, Rule.of(0.9, 0.999, 1e-8, step, 1.0), 1.0, 0.0)
        moved, moved_exact = ours - before, exact.detach() - before_exact
        farthest = max(farthest, float(moved.abs().max()))
        farthest_exact = max(farthest_exact, float(moved_exact.abs().max()))
        if step >= 100:
            errors.append(float((moved - moved_exact).norm() / moved_exact.norm()))
    assert sum(errors) / len(errors) < bound, errors[-1]
    assert farthest < 2 * farthest_exact


def test_a_second_moment_falls_with_its_gradient() -> None:
    """With beta2 = 0.999 a step changes v by a thousandth, and levels are an eighth apart: rounding to nearest would
    keep v where it is for ever."""
    master, moments = torch.zeros(NUM), ByteMoments.zeros(torch.zeros(NUM))
    v = 0.0
    for step in range(1200):
        size = 1.0 if step < 200 else 0.1
        v = 0.999 * v + 0.001 * size**2
        given = torch.full((NUM,), size)
        given[::BLOCK] = 1.0  # something in each block stays as large as it was
        adamw8_(master, given, moments, Rule.of(0.9, 0.999, 1e-8, step, 1.0), 1e-3, 0.0)
    found = decode(moments.v.view(-1, BLOCK), moments.scale[1], LEVELS_V)[:, 1:]
    assert float(found.mean()) == pytest.approx(v, rel=0.03)
    assert v < 0.1


def test_zero_gradients_leave_zero_moments_and_weights() -> None:
    master, moments = torch.ones(NUM), ByteMoments.zeros(torch.ones(NUM))
    for step in range(3):
        adamw8_(master, torch.zeros(NUM), moments, Rule.of(0.9, 0.999, 1e-8, step, 1.0), 1e-2, 0.0)
    assert bool((master == 1).all())
    assert not moments.m.any()
    assert not moments.v.any()


def test_only_large_masters_have_byte_moments(world: Path, tmp_path: Path) -> None:
    run = Run(recipe(world, optim__moments="8bit"), tmp_path / "run")
    run.stepper.run(0, [run.loader.next() for _ in range(2)])
    state = run.optimizer.state_dict()
    for name, parameter in run.optimizer.parameters:
        in_bytes = parameter.numel() >= MIN_ELEMENTS and not name.endswith(".log_scale")
        assert (f"{name}#m" in state) == in_bytes, name
        assert (f"{name}#exp_avg" in state) == (not in_bytes), name
        if in_bytes:
            assert state[f"{name}#m"].dtype == state[f"{name}#v"].dtype == torch.uint8
    assert isinstance(run.optimizer._adamw8, AdamW8)


def test_a_resumed_run_is_the_run(world: Path, tmp_path: Path) -> None:
    made = recipe(world, optim__moments="8bit", optim__num_steps=5)
    straight = dict(open_weights(train(made, tmp_path / "straight")))
    stopped = RuntimeError("power")

    def cut(report: Any, num_steps: int) -> None:
        if report.step == 2:
            raise stopped

    with pytest.raises(RuntimeError):
        train(made, tmp_path / "cut", progress=cut)
    resumed = dict(open_weights(train(made, tmp_path / "cut", resume=True)))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    logs = [
        [{**line, "tokens_per_second": 0} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("straight", "cut")
    ]
    assert logs[0] == logs[1]


def test_a_stopped_step_changes_no_byte(world: Path, tmp_path: Path) -> None:
    run = Run(recipe(world, optim__moments="8bit"), tmp_path / "run")
    run.stepper.run(0, [run.loader.next() for _ in range(2)])
    flag = torch.zeros(())
    run.optimizer.guard(flag)
    before = {name: tensor.clone() for name, tensor in run.optimizer.state_dict().items()}
    masters = {name: tensor.detach().clone() for name, tensor in run.masters.masters()}
    flag.fill_(1.0)
    for _, parameter in run.optimizer.parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    run.optimizer.step(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.optimizer.state_dict().items())
    assert all(torch.equal(tensor, masters[name]) for name, tensor in run.masters.masters())


def test_curves_lie_closer_than_two_seeds(world: Path, tmp_path: Path) -> None:
    curves = {}
    for name, moments, seed in (("fp32", "fp32", 0), ("8bit", "8bit", 0), ("other", "fp32", 1)):
        made = recipe(
            world, optim__moments=moments, optim__num_steps=60, runtime__seed=seed, runtime__checkpoint_every_steps=0
        )
        train(made, tmp_path / name)
        curves[name] = torch.tensor([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    between = float((curves["fp32"] - curves["8bit"]).abs().mean())
    between_seeds = float((curves["fp32"] - curves["other"]).abs().mean())
    assert between < 0.5 * between_seeds
    assert float(curves["8bit"][-10:].mean()) < 0.7 * float(curves["8bit"][:10].mean())
