"""The loop as a whole, on models small enough to train in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import COLOURS, recipe_tree, write_models, write_rows

from grace_vlm.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from grace_vlm.formats.folder import read_grid
from grace_vlm.formats.publish import publish_model
from grace_vlm.formats.verify import verify
from grace_vlm.formats.weights import open_weights
from grace_vlm.losses.objective import LossTerms
from grace_vlm.models.toy import build_toy_model, build_toy_processor
from grace_vlm.ptq.quantize import quantize_folder
from grace_vlm.quant.affine import bake
from grace_vlm.train import step as step_module
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import Run, train
from grace_vlm.train.open import open_rows
from grace_vlm.train.record import read_metrics
from grace_vlm.train.step import StepReport


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    write_rows(folder)
    write_models(folder)
    return folder


def recipe(folder: Path, **overrides: Any) -> Recipe:
    return recipe_from(recipe_tree(folder, runtime__checkpoint_every_steps=0, **overrides), "test")


@pytest.mark.parametrize(
    ("method", "scheme", "has_teacher"),
    [
        ("sft", "bf16", False),
        ("qat", "w4g128", False),
        ("kd", "bf16", True),
        ("kd", "w2g64", True),
        ("grace", "w8g32", True),
    ],
)
def test_every_method_trains_and_publishes(
    world: Path, tmp_path: Path, method: str, scheme: str, has_teacher: bool
) -> None:
    final = train(recipe(world, method=method, scheme=scheme, optim__num_steps=3), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all((line["distillation"] is not None) == has_teacher for line in lines)
    assert all((line["relational"] is not None) == (method == "grace") for line in lines)
    assert (final / "grid").is_dir() == (scheme != "bf16")
    if scheme != "bf16":
        weights = open_weights(final)
        for name, tensor in read_grid(final).items():
            assert torch.equal(weights[f"{name}.weight"], bake(tensor)), name
    assert verify(final, final).equal if scheme != "bf16" else True


def test_switches_of_grace_change_what_they_name(world: Path, tmp_path: Path) -> None:
    outcomes = {}
    for switch in ("none", "gate", "decoupled", "relational", "adaptive"):
        overrides = {} if switch == "none" else {f"loss__{switch}": False}
        train(recipe(world, optim__num_steps=2, **overrides), tmp_path / switch)
        outcomes[switch] = read_metrics(tmp_path / switch / "metrics.jsonl")
    assert outcomes["gate"][0]["gate_mean"] is None
    assert outcomes["relational"][0]["relational"] is None
    assert outcomes["adaptive"][1]["weight"] == 1.0  # fixed_weight
    assert outcomes["decoupled"][0]["distillation"] != outcomes["none"][0]["distillation"]
    assert outcomes["none"][0]["weight"] == 0.5


def test_accumulation_does_not_change_the_step(world: Path, tmp_path: Path) -> None:
    """Global normalisers: 1 x 4 rows and 4 x 1 rows are the same optimizer step, to FP32 rounding."""
    lines = []
    for micro, accumulation in ((4, 1), (1, 4)):
        out = tmp_path / f"{micro}x{accumulation}"
        train(recipe(world, optim__num_steps=1, data__micro_batch_size=micro, data__accumulation=accumulation), out)
        lines.append(read_metrics(out / "metrics.jsonl")[0])
    for key in ("cross_entropy", "distillation", "relational", "grad_norm", "gate_mean"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=2e-4), key


def test_microbatch_normalization_is_another_step(world: Path, tmp_path: Path) -> None:
    """Where micro-batches have different numbers of supervised tokens, a token weighs differently."""
    path = write_rows(tmp_path / "data")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] = "red " * (1 + 7 * (number % 2))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    norms = {}
    for kind in ("global", "microbatch"):
        one = recipe(
            world,
            optim__num_steps=1,
            loss__normalization=kind,
            data__train=str(path),
            data__micro_batch_size=1,
            data__accumulation=6,
        )
        train(one, tmp_path / kind)
        norms[kind] = read_metrics(tmp_path / kind / "metrics.jsonl")[0]["grad_norm"]
    assert abs(norms["global"] / norms["microbatch"] - 1) > 0.01


def test_gradient_checkpointing_changes_nothing(world: Path, tmp_path: Path) -> None:
    runs = {}
    for flag in (False, True):
        final = train(recipe(world, optim__num_steps=2, runtime__gradient_checkpointing=flag), tmp_path / str(flag))
        runs[flag] = dict(open_weights(final))
    assert all(torch.equal(runs[False][name], runs[True][name]) for name in runs[False])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("term", ["cross_entropy", "distillation", "relational"])
def test_a_term_that_is_not_finite_stops_before_the_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str, value: float
) -> None:
    run = Run(recipe(world), tmp_path / "run")
    before = {name: master.detach().clone() for name, master in run.masters.masters()}
    scales = {name: scale.detach().clone() for name, scale in run.masters.log_scales()}
    leaves = {name: leaf.detach().clone() for name, leaf in run.student.model.named_parameters()}
    real = step_module.compute_terms

    def poisoned(*args: Any, **kwargs: Any) -> LossTerms:
        terms = real(*args, **kwargs)
        fields = {**terms.__dict__, term: torch.tensor(value)}
        return LossTerms(**fields)

    monkeypatch.setattr(step_module, "compute_terms", poisoned)
    batches = [run.loader.next() for _ in range(2)]
    named = ", ".join(batches[0].sample_ids)
    with pytest.raises(NonFiniteError) as stop:
        run.stepper.run(0, batches)
    assert str(stop.value) == (
        f"step 0: {term} is not finite for samples {named}; the weights are those of before the step"
    )
    assert all(torch.equal(before[name], master) for name, master in run.masters.masters())
    assert all(torch.equal(scales[name], scale) for name, scale in run.masters.log_scales())
    assert all(torch.equal(leaves[name], leaf) for name, leaf in run.student.model.named_parameters())


def test_a_poisoned_teacher_is_named(world: Path, tmp_path: Path) -> None:
    run = Run(recipe(world), tmp_path / "run")
    assert run.teacher is not None
    with torch.no_grad():
        run.teacher.model.model.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="step 3: teacher gate is not finite for samples "):
        run.stepper.run(3, [run.loader.next()])


def test_a_poisoned_scale_stops(world: Path, tmp_path: Path) -> None:
    run = Run(recipe(world), tmp_path / "run")
    _, scale = next(run.masters.log_scales())
    with torch.no_grad():
        scale.fill_(float("nan"))
    run.masters.materialize()
    with pytest.raises(NonFiniteError):
        run.stepper.run(0, [run.loader.next()])


def test_bad_rows_are_in_the_ledger_and_over_budget_stops(world: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data")
    (tmp_path / "data" / "images" / "5.png").write_bytes(b"\x89PNG")
    overrides: dict[str, Any] = {"data__train": str(tmp_path / "data" / "rows.jsonl"), "optim__num_steps": 6}
    train(recipe(world, data__max_bad_fraction=0.05, **overrides), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in lines] == [(5, "r5")]
    with pytest.raises(DataError, match="1 bad rows of 24 are over the budget of 0"):
        train(recipe(world, **overrides), tmp_path / "strict")


def test_a_resume_names_what_is_another_recipe_and_speeds_are_of_whole_steps(world: Path, tmp_path: Path) -> None:
    def interrupt(report: StepReport, num_steps: int) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    begun = recipe_from(recipe_tree(world, optim__num_steps=4), "test")
    with pytest.raises(KeyboardInterrupt):
        train(begun, tmp_path / "run", progress=interrupt)
    other = recipe_from(recipe_tree(world, optim__num_steps=5, data__micro_batch_size=1), "test")
    with pytest.raises(CheckpointError) as caught:
        train(other, tmp_path / "run", resume=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run'} is a run of another recipe (data.micro_batch_size: 2 then, 1 now; "
        "optim.num_steps: 4 then, 5 now); restore these settings or start a new run"
    )
    train(begun, tmp_path / "run", resume=True)
    speeds = [line["tokens_per_second"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    # Every step is followed by a checkpoint, and read at once.
    assert len(speeds) == 4
    assert max(speeds) < 50 * min(speeds)


def test_a_file_of_rows_is_opened_once_until_it_changes(tmp_path: Path) -> None:
    path = write_rows(tmp_path, num_rows=8)
    made = recipe(tmp_path)
    one = open_rows(made)
    assert open_rows(made) is one
    assert len(one.text_lengths) == 8
    assert one.text_lengths[0] == sum(len(turn.text) for turn in one.row(0).turns)  # type: ignore[union-attr]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:5]), encoding="utf-8")
    assert len(open_rows(made)) == 5


@pytest.mark.parametrize("size", ["tiny", "qwen2_vl", "llava"])
def test_scales_start_as_the_student_has_them(tmp_path: Path, size: str) -> None:
    """A run that moves nothing ends with the grid that it began with, which no rule finds in the weights."""
    write_rows(tmp_path, num_rows=8)
    processor = build_toy_processor(["what color is the square?", *COLOURS] * 3, 320, size=size)
    publish_model(tmp_path / "plain", build_toy_model(size, processor), processor, {}, (), "# toy\n")
    quantize_folder(str(tmp_path / "plain"), tmp_path / "w4", "w4g64", scale="minmax")
    before = read_grid(tmp_path / "w4")
    still = {"optim__num_steps": 1, "optim__learning_rate": 1e-30, "optim__scale_learning_rate": 0.0}
    base = {"method": "qat", "model": {"student": str(tmp_path / "w4")}, **still}
    after = {}
    for rule in ("stored", "mse"):
        made = recipe(tmp_path, **base, scheme="w4g64", quant={"scale_init": rule})
        after[rule] = read_grid(train(made, tmp_path / rule))
    assert before.keys() == after["stored"].keys()
    for name, tensor in before.items():
        assert torch.equal(after["stored"][name].scale, tensor.scale)
        assert torch.equal(after["stored"][name].codes, tensor.codes)
    assert any(not torch.equal(after["mse"][name].scale, tensor.scale) for name, tensor in before.items())
    for student, scheme, reason in (
        ("plain", "w4g64", "wants a folder with its grid, .* and .*plain has none; take a rule, for example mse"),
        ("w4", "w4g32", "is w4g64, bf16 in .* and w4g32, bf16 here; set scheme"),
    ):
        changed = {**base, "model": {"student": str(tmp_path / student)}, "quant": {"scale_init": "stored"}}
        with pytest.raises(ConfigError, match=reason):
            Run(recipe(tmp_path, **changed, scheme=scheme), tmp_path / "refused")
