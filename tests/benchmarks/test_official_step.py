"""The restated official step: its terms are those of loss.implementation=official, and it learns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import recipe_tree, write_models, write_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import official_step as official

from grace_vlm.data.collate import Batch
from grace_vlm.models.load import load_model
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import Run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    write_rows(folder)
    write_models(folder)
    return folder


def opened(world: Path, out: Path, **overrides: Any) -> tuple[Run, list[Batch]]:
    """Our run, and micro-batches with their pixels."""
    settings = {"runtime__tower_cache_gib": 0, "loss__relational_warmup_steps": 0, **overrides}
    run = Run(recipe_from(recipe_tree(world, loss__implementation="official", **settings), "test"), out)
    return run, [run.loader.next() for _ in range(6)]


def fresh_student(world: Path) -> Any:
    """One whose gradients no run takes away."""
    return load_model(str(world / "student"), "cpu").model


def test_its_terms_are_the_official_implementations(world: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data__accumulation": 1, "quant": {"scale_init": "minmax"}}
    run, batches = opened(world, tmp_path / "run", **settings)
    ours = run.stepper.run(0, batches[:1])
    assert run.teacher is not None
    step = official.OfficialStep(fresh_student(world), run.teacher.model, "grace")
    step.loss(batches[0])
    for name in ("cross_entropy", "distillation", "relational"):
        assert float(step.terms[name].detach()) == pytest.approx(getattr(ours, name), rel=2e-3), name


@pytest.mark.parametrize("mode", ["sft", "qat", "grace"])
def test_it_learns(world: Path, tmp_path: Path, mode: official.Mode) -> None:
    run, batches = opened(world, tmp_path / "run")
    assert run.teacher is not None
    student = fresh_student(world)
    step = official.OfficialStep(student, run.teacher.model if mode == "grace" else None, mode, learning_rate=1e-3)
    layers = [m for m in student.modules() if isinstance(m, official.FakeQuantLinear)]
    assert len(layers) == (0 if mode == "sft" else len(run.plan.schemes))
    losses = [float(step.run(batches[:2])) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(p.grad is None for p in step.trained)


def test_a_fake_quantized_linear_is_on_its_grid_and_learns_its_scale() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 8, bias=False)
    layer = official.FakeQuantLinear(linear)
    x = torch.eye(256)
    found = layer(x).t()
    scale = layer.log_scale.detach().exp().repeat_interleave(128, dim=1)
    codes = found / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert float(codes.min()) >= -8
    assert float(codes.max()) <= 7
    found.square().sum().backward()
    assert layer.log_scale.grad is not None
    assert bool((layer.log_scale.grad != 0).all())
