"""A step is queued without looking at it, and what is not finite changes nothing, however late it is seen."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.data.collate import Batch
from grace_vlm.errors import NonFiniteError
from grace_vlm.losses.objective import LossTerms
from grace_vlm.train import step as step_module
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import Run, train
from grace_vlm.train.record import read_metrics

READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "bincount"}
"""What needs a number or a shape from the device: on a GPU the host waits for it."""
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    write_rows(folder)
    write_models(folder)
    return folder


def recipe(folder: Path, **overrides: Any) -> Recipe:
    settings: dict[str, Any] = {"runtime__checkpoint_every_steps": 0, "runtime__tower_cache_gib": 0, **overrides}
    return recipe_from(recipe_tree(folder, **settings), "test")


class Reads(TorchDispatchMode):
    """Counts operations that read the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.seen[name] += 1
        elif name in ("index", "index_put", "index_put_"):  # by a boolean mask: how many are true?
            self.seen[name] += any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sft", "qat", "kd", "grace"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_queued_without_a_read(
    world: Path, tmp_path: Path, method: str, packing: bool, checkpointing: bool
) -> None:
    overrides = {"scheme": "bf16"} if method == "sft" else {}
    made = recipe(
        world, method=method, data__packing=packing, runtime__gradient_checkpointing=checkpointing, **overrides
    )
    run = Run(made, tmp_path / "run")
    run.stepper.run(0, [run.loader.next() for _ in range(2)])  # tables of grids are made once
    batches = [run.loader.next() for _ in range(2)]
    with Reads() as reads:
        pending = run.stepper.launch(1, batches, count_flips=True)
    # Two checks a micro-batch that only a CPU makes (losses/linear_gdkd.py): targets, and the gradient of the loss.
    assert reads.seen == {"_local_scalar_dense": 2 * len(batches)}
    assert pending.resolve().loss > 0


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Masters, scales, leaves and moments."""
    return {
        **{f"master {name}": tensor.detach().clone() for name, tensor in run.masters.masters()},
        **{f"scale {name}": tensor.detach().clone() for name, tensor in run.masters.log_scales()},
        **{f"leaf {name}": tensor.detach().clone() for name, tensor in run.student.model.named_parameters()},
        **{f"moment {name}": tensor.clone() for name, tensor in run.optimizer.state_dict().items()},
    }


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8))
        for name, tensor in before.items()
    )


def poison(run: Run, site: str, value: float, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> str:
    """Plant ``value`` at a site of the next step; returns how the error begins that must follow."""
    assert run.teacher is not None
    if site == "image":
        pixels = batches[0].pictures[0].pixels
        assert pixels is not None
        pixels[0] = value
        return "teacher gate is not finite for samples "
    if site == "teacher logits":
        run.teacher.head.data[:, 0] = value
        return "teacher gate is not finite for samples "
    if site == "student logits":
        head = run.stepper.head.data
        real = step_module.compute_terms

        def with_bad_head(objective: Any, hidden: torch.Tensor, matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            bad = torch.nn.Parameter(head.clone())
            bad.data[:, 0] = value
            return real(objective, hidden, bad, *args, **kwargs)

        monkeypatch.setattr(step_module, "compute_terms", with_bad_head)
        return "cross_entropy is not finite for samples "
    if site == "gradient":
        leaf = next(p for name, p in run.student.model.named_parameters() if name.endswith("down_proj.weight"))

        def planted(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[0, 0] = value
            return gradient

        leaf.register_hook(planted)
        return "the gradient is not finite for samples "
    if site == "scale":
        _, scale = next(run.masters.log_scales())
        scale.data[0, 0] = value
        run.masters.materialize()
        return "a log-scale is not finite before samples "
    real = step_module.compute_terms

    def poisoned(*args: Any, **kwargs: Any) -> LossTerms:
        terms = real(*args, **kwargs)
        return LossTerms(**{**terms.__dict__, site: torch.full_like(terms.total.detach(), value)})

    monkeypatch.setattr(step_module, "compute_terms", poisoned)
    return f"{site} is not finite for samples "


SITES = (
    "image", "teacher logits", "student logits", "cross_entropy", "distillation", "relational", "gradient", "scale",
)  # fmt: skip


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("site", SITES)
def test_what_is_not_finite_changes_no_weight(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, value: float
) -> None:
    """reliability: eight sites, three values. The next step, queued before anybody looked, changes nothing either."""
    run = Run(recipe(world), tmp_path / "run")
    run.stepper.run(0, [run.loader.next() for _ in range(2)])
    clean = state_of(run)
    batches = [run.loader.next() for _ in range(2)]
    following = [run.loader.next() for _ in range(2)]
    expected = poison(run, site, value, batches, monkeypatch)
    # A poisoned scale is itself a part of the state, and its leaf shows it.
    before = state_of(run) if site == "scale" else clean
    pending = run.stepper.launch(1, batches)
    later = run.stepper.launch(2, following)
    names = ", ".join(batches[0].sample_ids)
    with pytest.raises(NonFiniteError) as stop:
        pending.resolve()
    assert str(stop.value).startswith(f"step 1: {expected}{names}")
    assert str(stop.value).endswith("; the weights are those of before the step")
    assert same(before, state_of(run))
    if site not in ("image", "gradient"):
        with pytest.raises(NonFiniteError, match="step 2"):
            later.resolve()


def test_the_loop_looks_a_step_late_and_keeps_the_step_before(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 is bad: it is named although step 4 has been queued, three lines are written, nothing of it is saved."""
    real, calls = step_module.compute_terms, []

    def bad_at_the_fourth_step(*args: Any, **kwargs: Any) -> LossTerms:
        terms = real(*args, **kwargs)
        calls.append(1)
        return LossTerms(**{**terms.__dict__, "relational": terms.relational * float("nan" if len(calls) == 7 else 1)})

    monkeypatch.setattr(step_module, "compute_terms", bad_at_the_fourth_step)
    with pytest.raises(NonFiniteError, match=r"^step 3: relational is not finite for samples "):
        train(recipe(world), tmp_path / "bad")
    assert len(calls) == 2 * 5
    assert [line["step"] for line in read_metrics(tmp_path / "bad" / "metrics.jsonl")] == [0, 1, 2]
    assert not (tmp_path / "bad" / "final").exists()


def test_a_checkpoint_waits_for_its_step(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = step_module.compute_terms, []

    def bad_at_the_second_step(*args: Any, **kwargs: Any) -> LossTerms:
        terms = real(*args, **kwargs)
        calls.append(1)
        return LossTerms(**{**terms.__dict__, "relational": terms.relational * float("inf" if len(calls) > 2 else 1)})

    monkeypatch.setattr(step_module, "compute_terms", bad_at_the_second_step)
    with pytest.raises(NonFiniteError, match=r"^step 1: "):
        train(recipe(world, runtime__checkpoint_every_steps=1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert len(calls) == 4


@pytest.mark.parametrize("kept", [0, 1, 99])
def test_kept_layers_change_memory_and_no_bit(world: Path, tmp_path: Path, kept: int) -> None:
    overrides: dict[str, Any] = {"runtime__gradient_checkpointing": True, "runtime__kept_layers": kept}
    states = []
    for name, settings in (("plain", {}), ("kept", overrides)):
        run = Run(recipe(world, **settings), tmp_path / name)
        run.stepper.run(0, [run.loader.next() for _ in range(2)])
        states.append(state_of(run))
    num_layers = run.student.model.config.text_config.num_hidden_layers
    assert run.stepper.recompute == max(0, num_layers - kept)
    assert same(*states)


@pytest.mark.parametrize("packing", [False, True])
def test_a_teacher_of_larger_batches_says_the_same(world: Path, tmp_path: Path, packing: bool) -> None:
    run = Run(recipe(world, data__packing=packing), tmp_path / "run")
    assert run.teacher is not None
    batches = [run.loader.next() for _ in range(4)]
    together = run.teacher.signals(batches, 10**6)
    for batch, signal in zip(batches, together, strict=True):
        (alone,) = run.teacher.signals([batch], 1)
        assert signal.image_lengths == alone.image_lengths == batch.image_lengths
        for found, expected in zip(
            (signal.hidden, signal.gate, signal.relational), (alone.hidden, alone.gate, alone.relational), strict=True
        ):
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_micro_batch_finds_nothing_left_of_the_one_before(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor with a graph over the weights; a CUDA graph could not be recorded beside one (step.py)."""
    totals: list[weakref.ref[torch.Tensor]] = []
    original = step_module.compute_terms

    def watched(*args: Any, **kwargs: Any) -> LossTerms:
        assert all(total() is None for total in totals)
        terms = original(*args, **kwargs)
        assert terms.total.requires_grad
        totals.append(weakref.ref(terms.total))
        return terms

    monkeypatch.setattr(step_module, "compute_terms", watched)
    run = Run(recipe(world, data__accumulation=3), tmp_path / "run")
    for step in range(2):
        run.stepper.run(step, [run.loader.next() for _ in range(3)])
    assert len(totals) == 6


def test_a_teacher_says_everything_before_any_of_it_leaves(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy to another GPU waits for what is queued there, and the teacher's next words would wait behind it."""
    from grace_vlm.train.teacher import OnlineTeacher

    order: list[str] = []
    for name in ("signal", "_sent"):
        original = getattr(OnlineTeacher, name)

        def noted(self: OnlineTeacher, given: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(self, given)

        monkeypatch.setattr(OnlineTeacher, name, noted)
    run = Run(recipe(world), tmp_path / "run")
    assert run.teacher is not None
    run.teacher.signals([run.loader.next() for _ in range(3)], 1)
    assert order == ["signal"] * 3 + ["_sent"] * 3
