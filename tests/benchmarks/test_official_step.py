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
from grace_vlm.quant.lsq import lsq_backward
from grace_vlm.quant.scheme import QuantScheme
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import Run
from grace_vlm.train.teacher import OnlineTeacher


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
    assert isinstance(run.teacher, OnlineTeacher)
    step = official.OfficialStep(fresh_student(world), run.teacher.model, "grace")
    step.loss(batches[0])
    for name in ("cross_entropy", "distillation", "relational"):
        assert float(step.terms[name].detach()) == pytest.approx(getattr(ours, name), rel=2e-3), name


@pytest.mark.parametrize("mode", ["sft", "qat", "grace"])
def test_it_learns(world: Path, tmp_path: Path, mode: official.Mode) -> None:
    run, batches = opened(world, tmp_path / "run")
    assert isinstance(run.teacher, OnlineTeacher)
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
    assert float(codes.detach().min()) >= -8
    assert float(codes.detach().max()) <= 7
    found.square().sum().backward()
    assert layer.log_scale.grad is not None
    assert bool((layer.log_scale.grad != 0).all())


def test_a_fake_quantized_linears_gradients_are_those_of_lsq() -> None:
    """Whatever torch's clamp does at its bounds: with min-max scales 4 % of these weights stand there."""
    torch.manual_seed(0)
    layer = official.FakeQuantLinear(torch.nn.Linear(256, 64, bias=False))
    x, grad = torch.randn(32, 256), torch.randn(32, 64)
    layer(x).mul(grad).sum().backward()
    scheme = QuantScheme(4, 128, "fp32")
    expected, expected_scale = lsq_backward(grad.T @ x, layer.weight.detach(), layer.log_scale.detach(), scheme)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.log_scale.grad, expected_scale, rtol=1e-4, atol=1e-4)


def test_clamp_is_closed_by_every_torch() -> None:
    x = torch.tensor([-9.0, -8.0, 0.0, 7.0, 8.0], requires_grad=True)
    found = official.closed_clamp(x, -8, 7)
    found.sum().backward()
    assert found.tolist() == [-8.0, -8.0, 0.0, 7.0, 7.0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("relational_weight", [0.0, 3.0, 300.0])
def test_its_gradients_are_our_official_implementations_up_to_bf16(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relational_weight: float
) -> None:
    """Weights by name and all scales together: directions agree. On a CPU its weights and logits are FP32 and ours
    are rounded to BF16, which moves a few codes."""
    monkeypatch.setattr(official, "RELATIONAL_WEIGHT", relational_weight)
    run, batches = opened(
        world,
        tmp_path / "run",
        data__accumulation=1,
        loss__relational_weight=relational_weight,
        loss__normalization="microbatch",
        quant={"scale_init": "minmax", "scale_rounding": "fp32"},
        optim={"num_steps": 2, "max_grad_norm": 1e9},
    )
    ours: dict[str, torch.Tensor] = {}
    clip = run.optimizer.clip

    def kept(norm: torch.Tensor) -> None:
        ours.update({name: p.grad.clone() for name, p in run.optimizer.parameters if p.grad is not None})
        clip(norm)

    monkeypatch.setattr(run.optimizer, "clip", kept)
    run.stepper.run(0, batches[:1])
    assert isinstance(run.teacher, OnlineTeacher)
    student = fresh_student(world)
    official.OfficialStep(student, run.teacher.model, "grace").loss(batches[0]).backward()
    theirs = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert {name.replace(".weight.log_scale", ".log_scale") for name in ours} == set(theirs)
    scales: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, grad in ours.items():
        other = theirs[name.replace(".weight.log_scale", ".log_scale")].flatten()
        if name.endswith(".log_scale"):
            scales.append((grad.flatten(), other))
        else:
            assert float(torch.cosine_similarity(grad.flatten(), other, dim=0)) > 0.97, name
    a, b = (torch.cat(parts) for parts in zip(*scales, strict=True))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.9
    assert float(b.norm() / a.norm()) == pytest.approx(1.0, abs=0.1)
