"""The fused loss trains what the reference trains: curves over 200 steps beside those of another seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import Run, train
from grace_vlm.train.record import read_metrics

NUM_STEPS = 200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder / "data")
    write_models(folder)
    return folder


def recipe(world: Path, **overrides: Any) -> Any:
    tree = recipe_tree(world, data__train=str(world / "data" / "rows.jsonl"), runtime__checkpoint_every_steps=0)
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return recipe_from(tree, "test")


def curve(world: Path, out: Path, implementation: str, seed: int) -> torch.Tensor:
    """(200, 4): loss, cross-entropy, distillation, gradient norm."""
    made = recipe(
        world,
        optim={"num_steps": NUM_STEPS, "learning_rate": 1e-3, "scale_learning_rate": 1e-3},
        runtime__seed=seed,
        loss__implementation=implementation,
    )
    train(made, out)
    keys = ("loss", "cross_entropy", "distillation", "grad_norm")
    return torch.tensor([[line[key] for key in keys] for line in read_metrics(out / "metrics.jsonl")])


def test_curves_of_200_steps_lie_closer_than_two_seeds(world: Path, tmp_path: Path) -> None:
    fused = curve(world, tmp_path / "fused", "fused", 0)
    reference = curve(world, tmp_path / "reference", "reference", 0)
    other_seed = curve(world, tmp_path / "other", "fused", 1)
    assert len(fused) == NUM_STEPS
    assert float(fused[-20:, 0].mean()) < 0.7 * float(fused[:20, 0].mean())  # it learns
    between = (fused - reference).abs().mean(dim=0)
    between_seeds = (fused - other_seed).abs().mean(dim=0)
    assert bool((between <= between_seeds).all()), (between, between_seeds)
    # The first steps are the same numbers; later a code flips earlier or later, as with another order of summing.
    assert torch.allclose(fused[:3], reference[:3], rtol=2e-4)


def gradients(world: Path, tmp_path: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    """Gradients of the masters after one step's backward, before the optimizer."""
    run = Run(recipe(world, **overrides), tmp_path)
    seen: dict[str, torch.Tensor] = {}

    def keep(step: int) -> float:
        seen.update({name: master.grad.clone() for name, master in run.masters.masters() if master.grad is not None})
        return 0.0

    run.optimizer.step = keep  # type: ignore[method-assign]
    run.stepper.run(5, [run.loader.next() for _ in range(2)])
    return seen


@pytest.mark.parametrize("method", ["sft", "kd", "grace"])
@pytest.mark.parametrize("normalization", ["global", "microbatch"])
def test_a_steps_gradients_are_the_references(world: Path, tmp_path: Path, method: str, normalization: str) -> None:
    """All masters, the tied embedding among them, whose gradient is the head's and the embedding's."""
    options: dict[str, Any] = {"method": method, "loss__normalization": normalization}
    if method == "sft":
        options["scheme"] = "bf16"
    fused = gradients(world, tmp_path / "a", **options)
    reference = gradients(world, tmp_path / "b", **options, loss__implementation="reference")
    assert fused.keys() == reference.keys()
    assert any("embed_tokens" in name for name in fused)
    for name, expected in reference.items():
        scale = float(expected.abs().max())
        assert float((fused[name] - expected).abs().max()) <= 1e-4 * scale + 1e-9, name


def test_an_untied_heads_gradient_is_the_references(world: Path, tmp_path: Path) -> None:
    """LLaVA's head is a matrix of its own: autograd has nothing for it, the loss adds its gradient up itself."""
    options: dict[str, Any] = {"model": {"student": "toy:llava", "teacher": "toy:llava"}}
    fused = gradients(world, tmp_path / "a", **options)
    reference = gradients(world, tmp_path / "b", **options, loss__implementation="reference")
    name = next(name for name in fused if "lm_head" in name)
    scale = float(reference[name].abs().max())
    assert scale > 0
    assert float((fused[name] - reference[name]).abs().max()) <= 1e-4 * scale


def test_the_official_arithmetic_is_another_one(world: Path, tmp_path: Path) -> None:
    """BF16 logits move the gradient, by more than FP32 sums do and less than a tenth."""
    fused = gradients(world, tmp_path / "a")
    official = gradients(world, tmp_path / "b", loss__implementation="official")
    ours = torch.cat([x.flatten() for x in fused.values()])
    theirs = torch.cat([official[name].flatten() for name in fused])
    difference = float((ours - theirs).norm() / ours.norm())
    assert 1e-4 < difference < 0.1


def test_official_has_no_plain_kl(world: Path) -> None:
    for change in ({"method": "kd"}, {"loss__decoupled": False}):
        with pytest.raises(ConfigError) as refusal:
            recipe(world, loss__implementation="official", **change)
        assert str(refusal.value) == (
            "loss.implementation=official has no plain KL (method kd, loss.decoupled=false); use fused or reference"
        )
    with pytest.raises(ConfigError, match="official has the published gate; use fused or reference"):
        recipe(world, loss__implementation="official", loss__gate_signal="margin")
