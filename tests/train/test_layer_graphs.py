"""Layers laid into larger shapes, with a backward pass of their own: the same numbers, and where they are not made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.models import decoder
from grace_vlm.models.decoder import GRAPHS
from grace_vlm.models.graphs import GraphMemory, LayerGraphs, graph_layers, room_for
from grace_vlm.models.look_up import sum_look_ups
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import Run


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_room(lengths: list[int]) -> None:
    longest, tokens, whole = room_for(lengths)
    assert whole[: len(lengths)] == tuple(lengths)
    assert sum(whole) == tokens
    assert max(whole) <= longest
    assert tokens % 64 == 0
    assert tokens - sum(lengths) < max(64, sum(lengths) / 8)
    assert len(whole) & (len(whole) - 1) == 0


def test_few_shapes_for_many_packs_and_a_window_is_not_exceeded() -> None:
    packs = [[500] * 7 + [rest] for rest in range(1, 500)]
    assert len({room_for(lengths)[:2] for lengths in packs}) <= 3
    assert room_for([700, 20], window=700)[0] == 700
    assert max(room_for([700, 20], window=700)[2]) == 700


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    path = write_rows(folder, num_rows=36)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in range(0, 36, 3):
        rows[number]["conversations"][1]["value"] = "red " * (1 + number % 5)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    write_models(folder)
    return folder


def run_of(world: Path, out: Path, graphs: bool, **overrides: Any) -> Run:
    settings: dict[str, Any] = {"data__packing": True, "runtime__tower_cache_gib": 0, **overrides}
    run = Run(recipe_from(recipe_tree(world, **settings), "test"), out)
    if graphs:  # on a CPU the same functions run without being recorded
        add_graphs(run)
    return run


def add_graphs(run: Run) -> None:
    memory = graph_layers(run.student.model, run.masters.sums_of(run.student.model.model.language_model.layers))
    if run.teacher is not None:
        run.teacher.graph_layers(memory)


def graphs_of(run: Run) -> LayerGraphs:
    found = getattr(run.student.model.model.language_model, GRAPHS)
    assert isinstance(found, LayerGraphs)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        {"data__accumulation": 1},
        {"data__accumulation": 3},
        {"data__accumulation": 2, "runtime__gradient_checkpointing": True, "runtime__kept_layers": 1},
        {"method": "qat"},
        {"loss__relational_layer": 0},
        {"loss__relational": False},
    ],
    ids=["alone", "three", "recomputed", "qat", "tap 0", "no tap"],
)
def test_the_same_steps(world: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    loss = {"relational_warmup_steps": 3, "adaptive_weight": {"target": 1.0, "ema_decay": 0.5}}
    loss |= {key.removeprefix("loss__"): overrides.pop(key) for key in list(overrides) if key.startswith("loss__")}
    runs = [run_of(world, tmp_path / str(graphs), graphs, loss=loss, **overrides) for graphs in (False, True)]
    for step in range(6):
        reports = []
        for run in runs:
            batches = [run.loader.next() for _ in range(run.recipe.data.accumulation)]
            reports.append(run.stepper.run(step, batches))
        assert reports[1].loss == pytest.approx(reports[0].loss, rel=2e-5)
        assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-3)
    assert graphs_of(runs[1]).num_graphs >= 1
    for (name, plain), (_, graphed) in zip(runs[0].masters.masters(), runs[1].masters.masters(), strict=True):
        assert torch.allclose(plain, graphed, rtol=0, atol=3e-5), name


def test_look_ups_that_are_summed_give_the_same_steps(world: Path, tmp_path: Path) -> None:
    runs = [run_of(world, tmp_path / str(summed), graphs=False, data__accumulation=3) for summed in (False, True)]
    sum_look_ups(runs[1].student.model, runs[1].masters.accumulator)
    for step in range(3):
        plain, summed = (run.stepper.run(step, [run.loader.next() for _ in range(3)]) for run in runs)
        assert summed.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)
        assert summed.loss == pytest.approx(plain.loss, rel=1e-5)


def test_gradients_of_one_micro_batch(world: Path, tmp_path: Path) -> None:
    """Of every leaf, against autograd's own; the first replaces what the sums held and the second adds."""
    run = run_of(world, tmp_path / "run", graphs=False)
    batch = run.loader.next()
    found = []
    for graphs in (False, True):
        if graphs:
            add_graphs(run)
        for _ in range(3):  # a shape has its graph from the second time on
            run.masters.materialize()
            for _ in range(2):
                states = run.student.adapter.decode(
                    run.student.model,
                    batch.input_ids,
                    batch.position_ids,
                    run.vision.of(batch.pictures),
                    tap=-2,
                    segments=batch.segments,
                    visual=batch.visual,
                )
                assert states.relational is not None
                (states.last.square().mean() + states.relational.square().mean()).backward()  # type: ignore[no-untyped-call]
        found.append([total.clone() for total in run.masters.accumulators()])
    assert graphs_of(run).num_graphs == 2
    for plain, graphed in zip(*found, strict=True):
        assert torch.allclose(plain, graphed, rtol=1e-4, atol=1e-6 * float(plain.abs().max()) + 1e-12)


def test_two_forwards_before_a_backward_are_refused(world: Path, tmp_path: Path) -> None:
    run = run_of(world, tmp_path / "run", graphs=True)
    batch = run.loader.next()

    def forward() -> torch.Tensor:
        adapter, model = run.student.adapter, run.student.model
        vision = run.vision.of(batch.pictures)
        last = adapter.decode(
            model, batch.input_ids, batch.position_ids, vision, segments=batch.segments, visual=batch.visual
        ).last
        return last.sum()

    forward()
    kept = forward()
    with pytest.raises(AssertionError, match="a forward before the backward"):
        forward()
    kept.backward()  # type: ignore[no-untyped-call]
    run.masters.materialize()
    assert forward().isfinite()


def test_where_there_are_no_graphs(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from(recipe_tree(world, runtime__cuda_graphs=True, data__packing=False), "test")
    assert "runtime.cuda_graphs is for packed rows; set data.packing=true or runtime.cuda_graphs=false" in str(
        caught.value
    )
    with pytest.raises(ConfigError) as caught:
        Run(
            recipe_from(recipe_tree(world, runtime__cuda_graphs=True, data__packing=True, model__train="all"), "test"),
            tmp_path / "run",
        )
    assert str(caught.value) == (
        "runtime.cuda_graphs with model.train=all: this tower adds to layers of the decoder (DeepStack, 1), whose "
        "graphs make no gradient for it; set model.train=default or runtime.cuda_graphs=false"
    )


@pytest.mark.parametrize("repeats", [False, True])
def test_a_run_that_repeats_does_the_same_with_and_without_a_graph(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeats: bool
) -> None:
    """A pack is laid into the shape of a graph also the first time it comes, and where there are too many shapes."""
    run, plain = run_of(world, tmp_path / "run", graphs=True), []
    layers = decoder._run_layers

    def noted(*given: Any) -> Any:
        plain.append(given)
        return layers(*given)

    monkeypatch.setattr(decoder, "_run_layers", noted)
    monkeypatch.setattr("grace_vlm.models.graphs.MAX_GRAPHS", 0)
    torch.use_deterministic_algorithms(repeats)
    try:
        for step in range(3):
            assert run.stepper.run(step, [run.loader.next()]).loss > 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(plain) != repeats
    assert graphs_of(run).num_graphs == 0


def test_a_tower_alone_is_trained_also_where_a_row_has_no_picture(world: Path, tmp_path: Path) -> None:
    """Such a row has nothing to learn from, and its forward no gradient."""
    run = run_of(
        world, tmp_path / "run", True, method="sft", scheme="bf16", model={"student": "toy:llava", "train": "vision"}
    )
    batch = run.loader.next()
    embeds = run.student.model.get_input_embeddings()(batch.input_ids).detach()
    language = run.student.model.model.language_model
    rotary = language.rotary_emb(embeds, batch.position_ids[0])
    assert batch.segments is not None
    for _ in range(2):
        with decoder.attention(language, decoder._SEGMENTS, decoder.attend_segments):
            found = graphs_of(run).run(embeds, rotary, batch.segments, batch.visual, None, 0, ())
    assert found is not None
    assert not found[0].requires_grad
    trained = run_of(world, tmp_path / "trained", True, method="sft", scheme="bf16", model={"student": "toy:llava"})
    with pytest.raises(AssertionError, match="gradients of layers come with that of their input"):
        graphs_of(trained).run(embeds, rotary, batch.segments, batch.visual, None, 0, ())


@pytest.mark.parametrize("train", ["all", "vision"])
def test_towers_are_trained_through_graphs(world: Path, tmp_path: Path, train: str) -> None:
    """Of a tower that says all it says before the first layer; ``vision``: of layers without anything to train."""
    runs = [
        run_of(
            world,
            tmp_path / str(graphs),
            graphs,
            method="sft",
            scheme="bf16",
            model={"student": "toy:llava", "train": train},
        )
        for graphs in (False, True)
    ]
    for step in range(5):
        plain, graphed = (run.stepper.run(step, [run.loader.next()]) for run in runs)
        assert graphed.loss == pytest.approx(plain.loss, rel=2e-5)
        assert graphed.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3)
    assert graphs_of(runs[1]).num_graphs >= 1
    for (name, plain), (_, graphed) in zip(runs[0].masters.masters(), runs[1].masters.masters(), strict=True):
        assert torch.allclose(plain, graphed, rtol=0, atol=3e-5), name


@pytest.mark.parametrize("size", ["qwen2_vl", "qwen2_5_vl", "llava"])
def test_every_family(world: Path, tmp_path: Path, size: str) -> None:
    losses = []
    for graphs in (False, True):
        models = {"student": f"toy:{size}", "teacher": f"toy:{size}"}
        run = run_of(world, tmp_path / str(graphs), graphs, model=models)
        batches = [run.loader.next() for _ in range(2)]
        losses.append([run.stepper.run(step, batches).loss for step in range(4)])
    assert graphs_of(run).num_graphs >= 1
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_what_a_recording_would_keep_is_only_asked_of_bf16() -> None:
    """FP32 on a GPU attends segment by segment, by lengths that Python knows: such a pack has no graph."""
    from types import SimpleNamespace

    language = SimpleNamespace(layers=torch.nn.ModuleList([torch.nn.Linear(4, 4)]), config=SimpleNamespace())
    graphs = LayerGraphs(language, GraphMemory(torch.device("cpu")))
    embeds = SimpleNamespace(is_cuda=True, dtype=torch.float32, requires_grad=False, device=torch.device("cuda"))
    rotary = (torch.zeros(1, 8, 2), torch.zeros(1, 8, 2))
    for _ in range(3):
        assert graphs.run(embeds, rotary, (3, 5), torch.zeros(0), None, 0, ()) is None  # type: ignore[arg-type]
    assert graphs.num_graphs == 0
