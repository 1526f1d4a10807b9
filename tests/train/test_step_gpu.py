"""What a step asks of a GPU: nothing to wait for until it is read, once (make gpu-test)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.models import look_up
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import Run

pytestmark = pytest.mark.gpu

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""CUDA calls in which a host waits."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    path = write_rows(folder, num_rows=48)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in range(0, 48, 3):  # rows of several lengths, some without a picture
        rows[number]["conversations"][1]["value"] = "red " * (1 + number % 7)
    for number in range(0, 48, 8):
        rows[number] = {"id": f"t{number}", "conversations": [
            {"from": "human", "value": "what color?"}, {"from": "gpt", "value": "blue"}]}  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    write_models(folder)
    return folder


def recipe(folder: Path, **overrides: Any) -> Recipe:
    settings: dict[str, Any] = {"runtime__checkpoint_every_steps": 0, "runtime__device": "cuda", **overrides}
    return recipe_from(recipe_tree(folder, runtime__tower_cache_gib=0, **settings), "test")


@pytest.mark.parametrize("method", ["qat", "grace"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("teacher", ["cuda:0", "cuda:1"])
def test_one_wait_a_step(
    world: Path, tmp_path: Path, method: str, packing: bool, checkpointing: bool, teacher: str
) -> None:
    from torch.profiler import ProfilerActivity, profile

    if torch.device(teacher).index >= torch.cuda.device_count() or (method, teacher) == ("qat", "cuda:1"):
        pytest.skip("needs two GPUs and a teacher")
    made = recipe(
        world,
        method=method,
        model__teacher_device=teacher,
        data__packing=packing,
        runtime__gradient_checkpointing=checkpointing,
        data__accumulation=3,
    )
    run = Run(made, tmp_path / "run")
    run.stepper.run(0, [run.loader.next() for _ in range(3)])
    batches = [run.loader.next() for _ in range(3)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        torch.cuda.set_sync_debug_mode("error")
        try:
            pending = run.stepper.launch(1, batches, count_flips=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        report = pending.resolve()
    assert report.loss > 0
    waits = {event.key: event.count for event in seen.key_averages() if event.key.startswith(WAITS)}
    waits.pop("cudaMemcpyAsync", None)
    # The profiler waits for the device when it stops.
    assert waits.pop("cudaDeviceSynchronize", 0) <= 1
    assert sum(waits.values()) <= 1, waits
    pageable = [event.key for event in seen.key_averages() if "Pageable" in event.key]
    assert not pageable  # a copy from ordinary memory waits inside the driver, where no call shows it


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"runtime__compile": True, "runtime__gradient_checkpointing": True, "runtime__kept_layers": 1},
        {"runtime__compile": True, "model__teacher_precision": "fp8"},
        {"method": "qat"},
    ],
    ids=["eager", "compiled", "fp8", "qat"],
)
def test_graphs_say_the_same_and_wait_once(world: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    from torch.profiler import ProfilerActivity, profile

    found, launches = [], []
    for graphs in (False, True):
        made = recipe(world, data__packing=True, data__accumulation=3, runtime__cuda_graphs=graphs, **options)
        run = Run(made, tmp_path / str(graphs))
        batches = [[run.loader.next() for _ in range(3)] for _ in range(3)]
        reports = [run.stepper.run(step, batches[step % 3]) for step in range(9)]
        found.append(torch.tensor([[report.loss, report.grad_norm] for report in reports]))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            torch.cuda.set_sync_debug_mode("error")
            try:
                pending = run.stepper.launch(9, batches[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            pending.resolve()
        counts = {event.key: event.count for event in seen.key_averages()}
        waits = sum(counts.get(name, 0) for name in WAITS if name != "cudaMemcpy") - counts.get(
            "cudaDeviceSynchronize", 0
        )
        assert waits <= 1
        launches.append(sum(count for key, count in counts.items() if "LaunchKernel" in key))
    assert torch.allclose(found[0], found[1], rtol=3e-2), found
    # Two layers of a toy, compiled, are few launches beside the rest of a step.
    assert launches[1] < launches[0] * (0.8 if options.get("runtime__compile") else 0.5), launches


@pytest.mark.parametrize("train", ["all", "vision"])
def test_towers_are_trained_through_recorded_layers(world: Path, tmp_path: Path, train: str) -> None:
    found = []
    for graphs in (False, True):
        models = {"student": "toy:llava", "train": train}
        options: dict[str, Any] = {"method": "sft", "scheme": "bf16", "model": models}
        run = Run(recipe(world, data__packing=True, runtime__cuda_graphs=graphs, **options), tmp_path / str(graphs))
        batch = run.loader.next()
        reports = [run.stepper.run(step, [batch]) for step in range(6)]
        found.append(torch.tensor([[report.loss, report.grad_norm] for report in reports]))
    assert torch.allclose(found[0], found[1], rtol=3e-2), found


def test_a_teacher_on_a_cpu_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher_device is cpu and the student computes on cuda; "):
        Run(recipe(world, model__teacher_device="cpu"), tmp_path / "run")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{}, {"model__teacher_precision": "fp8"}, {"runtime__compile": True}])
def test_a_teacher_on_another_gpu_says_the_same(world: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    losses = []
    for device in ("cuda:0", "cuda:1"):
        run = Run(recipe(world, model__teacher_device=device, data__accumulation=3, **options), tmp_path / device)
        batches = [[run.loader.next() for _ in range(3)] for _ in range(4)]
        pending = [run.stepper.launch(step, three) for step, three in enumerate(batches)]  # queued over one another
        losses.append([(one.resolve().loss, one.resolve().distillation) for one in pending])
        assert run.teacher is not None
        assert run.teacher.head.device == torch.device("cuda:0")
        assert torch.cuda.current_device() == 0
    assert losses[0] == losses[1]


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_layers_are_compiled_once_for_all_lengths(world: Path, tmp_path: Path, packing: bool) -> None:
    from torch._dynamo.utils import counters

    losses = []
    for name, compiled in (("eager", False), ("compiled", True)):
        run = Run(recipe(world, data__packing=packing, runtime__compile=compiled), tmp_path / name)
        for step in range(2):  # student with gradients and teacher without: a form each
            run.stepper.run(step, [run.loader.next() for _ in range(2)])
        before = counters["stats"]["unique_graphs"]
        losses.append([run.stepper.run(step, [run.loader.next() for _ in range(2)]).loss for step in range(2, 10)])
        assert counters["stats"]["unique_graphs"] - before <= 2  # attention asks for a smallest length once
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-2)


def test_look_ups_add_what_autograd_would(world: Path, tmp_path: Path) -> None:
    """Gradients of the table of words, over a step of three micro-batches, with its sum and without (look_up.py)."""
    norms = []
    for direct in (False, True):
        run = Run(recipe(world, data__accumulation=3), tmp_path / f"{direct}")
        table = run.student.model.model.language_model.embed_tokens
        if not direct:
            delattr(table, look_up._SUM)
        norms.append([run.stepper.run(step, [run.loader.next() for _ in range(3)]).grad_norm for step in range(3)])
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
