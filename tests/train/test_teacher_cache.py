"""A run that reads its teacher from a disk is the run that has it in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed_run import write_mixed_rows
from test_step import Reads
from toy_run import recipe_tree, write_models

from grace_vlm.data.collate import Batch
from grace_vlm.data.ledger import Ledger
from grace_vlm.errors import CheckpointError
from grace_vlm.losses.rcka import centred_grams
from grace_vlm.losses.signal import Grams, TeacherSignal
from grace_vlm.train import cache_build
from grace_vlm.train.cache_build import build_cache
from grace_vlm.train.cache_identity import known_weights, weights_of
from grace_vlm.train.cache_shards import EntryStore
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import Run, train
from grace_vlm.train.open import open_loader, open_rows
from grace_vlm.train.record import read_metrics
from grace_vlm.train.teacher_cache import CachedTeacher

ROUNDING = 2e-5
"""Of a hidden state, absolute: FP32 products of other batch shapes, with values up to about 4; 2.4e-6 was found."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one picture, of several, of none, and two that are bad; teacher, student, and a cache."""
    folder = tmp_path_factory.mktemp("cache")
    write_mixed_rows(folder)
    write_models(folder)
    build_cache(recipe(folder), folder / "cache")
    return folder


def recipe(folder: Path, **overrides: Any) -> Recipe:
    settings = {"runtime__checkpoint_every_steps": 0, "data__max_bad_fraction": 0.1, **overrides}
    settings.setdefault("runtime__tower_cache_gib", 0)
    return recipe_from(recipe_tree(folder, **settings), "test")


def cached(folder: Path, cache: Path, **overrides: Any) -> Recipe:
    return recipe(folder, model__teacher=None, model__teacher_cache=str(cache), **overrides)


def test_what_a_build_leaves(world: Path) -> None:
    """An entry for every good row; the bad ones in the ledger; running it again finds nothing to do."""
    before = {path: path.read_bytes() for path in (world / "cache").rglob("*") if path.is_file()}
    report = build_cache(recipe(world), world / "cache")
    assert (report.num_rows, report.num_bad, report.num_entries, report.num_new) == (39, 2, 37, 0)
    after = {path: path.read_bytes() for path in (world / "cache").rglob("*") if path.is_file()}
    assert after == before
    assert {path.relative_to(world / "cache").as_posix() for path in after} == {
        "cache.json",
        "ledger.jsonl",
        "head/head.safetensors",
        "head/manifest.json",
        "head/manifest.sha256",
        "shards/shard-000000/entries.safetensors",
        "shards/shard-000000/manifest.json",
        "shards/shard-000000/manifest.sha256",
    }


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"data__packing": True},
        {"data__packing": True, "data__micro_batch_size": 7, "data__max_batch_tokens": 256, "data__max_tokens": 256},
        {"data__micro_batch_size": 5, "data__accumulation": 1},
        {"data__workers": 2},
        {"data__pixel_cache_gib": 0.1, "runtime__tower_cache_gib": 0.1, "data__samples_kept": 100},
        {"data__group_by_length": True},
    ],
    ids=["padded", "packed", "packs of tokens", "larger batches", "workers", "kept pixels and features", "grouped"],
)
def test_a_cached_run_is_the_online_run(world: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    """Ten steps of GRACE: every measurement to 4e-5, where 4e-6 was found. Batches are others than the build's, and
    FP32 rounds sums of other shapes otherwise; Adam turns a gradient at rounding level into a step either way, which
    ten steps carry on."""
    lines = {}
    for name, made in (("online", recipe), ("cached", lambda folder, **more: cached(folder, world / "cache", **more))):
        train(made(world, optim__num_steps=10, **layout), tmp_path / name)
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    assert len(lines["online"]) == len(lines["cached"]) == 10
    for online, from_disk in zip(lines["online"], lines["cached"], strict=True):
        for key in ("supervised_tokens", "tokens", "images", "images_in_relation", "step"):
            assert online[key] == from_disk[key]
        for key in ("loss", "cross_entropy", "distillation", "relational", "gate_mean", "weight"):
            assert from_disk[key] == pytest.approx(online[key], rel=4e-5, abs=1e-6), key
    assert (tmp_path / "online/ledger.jsonl").read_bytes() == (tmp_path / "cached/ledger.jsonl").read_bytes()


def signals_of(run: Run, num: int) -> list[tuple[Batch, TeacherSignal]]:
    batches = [run.loader.next() for _ in range(num)]
    assert run.teacher is not None
    return list(zip(batches, run.teacher.signals(batches, run.recipe.runtime.frozen_batch_tokens), strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_signals_are_exact_where_batches_are_those_of_the_build(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """One row a batch on both sides: hidden states and gate bit for bit, Gram matrices to FP32's rounding."""
    alone = {"data__packing": packing, "data__micro_batch_size": 1, "runtime__frozen_batch_tokens": 1}
    build_cache(recipe(world, **alone), tmp_path / "cache")
    online = Run(recipe(world, **alone), tmp_path / "online")
    from_disk = Run(cached(world, tmp_path / "cache", **alone), tmp_path / "cached")
    for (batch, expected), (_, found) in zip(signals_of(online, 37), signals_of(from_disk, 37), strict=True):
        assert torch.equal(found.hidden, expected.hidden)
        assert torch.equal(found.gate, expected.gate)
        assert found.image_lengths == expected.image_lengths == batch.image_lengths
        assert isinstance(found.relational, Grams)
        assert isinstance(expected.relational, torch.Tensor)
        grams = centred_grams(expected.relational, batch.image_lengths)
        assert torch.allclose(found.relational.values, grams.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("hidden", "tolerance"), [("exact", ROUNDING), ("bf16", 2**-8), ("fp8", 2**-4)])
def test_hidden_states_are_kept_as_asked(world: Path, tmp_path: Path, hidden: Any, tolerance: float) -> None:
    """To half a step of the format: 2^-9 of a value in BF16, 2^-4 of it in E4M3 (or of its row's largest / 448)."""
    build_cache(recipe(world), tmp_path / "cache", hidden)
    online = Run(recipe(world), tmp_path / "online")
    from_disk = Run(cached(world, tmp_path / "cache"), tmp_path / "cached")
    for (_, expected), (_, found) in zip(signals_of(online, 6), signals_of(from_disk, 6), strict=True):
        assert found.hidden.dtype == torch.float32
        assert found.hidden.shape == expected.hidden.shape
        allowed = tolerance * expected.hidden.abs() + ROUNDING
        if hidden == "fp8":
            allowed = allowed + expected.hidden.abs().amax(dim=1, keepdim=True) / 448 * 2**-9
        assert bool(((found.hidden - expected.hidden).abs() <= allowed).all())
        if hidden != "exact":
            assert not torch.equal(found.hidden, expected.hidden)
        assert torch.allclose(found.gate, expected.gate, rtol=0, atol=1e-5)  # of the states as they were


def test_bytes_an_entry_takes(world: Path, tmp_path: Path) -> None:
    sizes = {}
    for hidden in ("exact", "bf16", "fp8"):
        build_cache(recipe(world), tmp_path / hidden, hidden)  # type: ignore[arg-type]
        (shard,) = EntryStore(tmp_path / hidden).shards
        entry = shard.read(0)
        sizes[hidden] = sum(tensor.nbytes for tensor in entry.payloads() if tensor is not entry.grams) / len(entry.gate)
    width = 128
    assert sizes == {"exact": 4 * width + 4, "bf16": 2 * width + 4, "fp8": width + 4 + 4}


@pytest.mark.parametrize("switch", ["loss__gate", "loss__relational", "method"])
def test_one_cache_serves_every_method(world: Path, tmp_path: Path, switch: str) -> None:
    """Made by a kd recipe's own build or grace's, it holds gate and relations; a run uses what its loss has."""
    section, _, name = switch.partition("__")
    overrides: dict[str, Any] = {"method": "kd"} if section == "method" else {"loss": {name: False}}
    run = Run(cached(world, world / "cache", **overrides), tmp_path / "cached")
    online = Run(recipe(world, **overrides), tmp_path / "online")
    for (_, expected), (_, found) in zip(signals_of(online, 3), signals_of(run, 3), strict=True):
        assert found.gate.dtype == torch.float32
        assert torch.allclose(found.gate, expected.gate, atol=1e-5)
        assert isinstance(found.relational, torch.Tensor) == (name == "relational" or switch == "method")
    report = run.stepper.run(0, [run.loader.next() for _ in range(2)])
    assert report.loss > 0


def test_no_body_of_a_teacher_is_opened(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("grace_vlm.train.loop.open_teacher", lambda *args: opened.append(args))
    run = Run(cached(world, world / "cache"), tmp_path / "run")
    assert isinstance(run.teacher, CachedTeacher)
    assert not opened
    assert run.teacher.head.shape == (384, 128)
    assert run.teacher.keeps("any picture")


def test_a_row_that_occurs_twice_has_one_entry(world: Path, tmp_path: Path) -> None:
    text = (world / "rows.jsonl").read_text()
    (world / "twice.jsonl").write_text(text + text.splitlines()[0].replace('"r0"', '"again"') + "\n")
    report = build_cache(recipe(world, data__train=str(world / "twice.jsonl")), tmp_path / "cache")
    assert (report.num_rows, report.num_entries) == (40, 37)


def test_rows_that_were_added_are_added(world: Path, tmp_path: Path) -> None:
    lines = (world / "rows.jsonl").read_text().splitlines()
    (world / "some.jsonl").write_text("\n".join(lines[:10]) + "\n")
    first = build_cache(recipe(world, data__train=str(world / "some.jsonl")), tmp_path / "cache")
    assert (first.num_entries, first.num_new) == (10, 10)
    second = build_cache(recipe(world), tmp_path / "cache")
    assert (second.num_entries, second.num_new) == (37, 27)


def test_progress_is_told(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_build, "READ_ROWS", 4)
    seen: list[tuple[int, int]] = []
    build_cache(recipe(world), tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 39) for done in range(1, 40)]


@pytest.mark.parametrize("hidden", ["exact", "fp8"])
def test_a_step_is_queued_without_a_read(world: Path, tmp_path: Path, hidden: Any) -> None:
    build_cache(recipe(world), tmp_path / "cache", hidden)
    run = Run(cached(world, tmp_path / "cache"), tmp_path / "run")
    run.stepper.run(0, [run.loader.next() for _ in range(2)])  # tables of grids are made once
    batches = [run.loader.next() for _ in range(2)]
    with Reads() as reads:
        pending = run.stepper.launch(1, batches)
    # Two checks a micro-batch that only a CPU makes (losses/linear_gdkd.py).
    assert reads.seen == {"_local_scalar_dense": 2 * len(batches)}
    assert pending.resolve().loss > 0


@pytest.mark.parametrize("packing", [False, True])
def test_every_rank_finds_its_rows(world: Path, tmp_path: Path, packing: bool) -> None:
    """Three ranks over two epochs: other orders and batches than the build's, the same answers as of one process."""
    made = cached(world, world / "cache", data__packing=packing)
    run = Run(made, tmp_path / "run")
    online = Run(recipe(world, data__packing=packing), tmp_path / "online")
    assert run.teacher is not None
    assert online.teacher is not None
    for rank in range(3):
        ledger = Ledger(tmp_path / f"{rank}.jsonl")
        device = torch.device("cpu")
        loader = open_loader(made, open_rows(made), run.student, ledger, device, rank=rank, world_size=3)
        batches = [loader.next() for _ in range(13)]
        pairs = zip(run.teacher.signals(batches, 1), online.teacher.signals(batches, 10**6), strict=True)
        for found, expected in pairs:
            assert torch.allclose(found.hidden, expected.hidden, rtol=0, atol=ROUNDING)
            assert found.image_lengths == expected.image_lengths


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava"])
def test_every_family_has_a_cache(world: Path, tmp_path: Path, family: str) -> None:
    """Made and read with a random teacher, whose weights are its seed; one step is the online run's."""
    toys = {"model__student": f"toy:{family}", "model__teacher": f"toy:{family}"}
    build_cache(recipe(world, **toys), tmp_path / "cache")
    reports = []
    for name, cache in (("online", None), ("cached", str(tmp_path / "cache"))):
        run = Run(recipe(world, **toys, model__teacher_cache=cache), tmp_path / name)
        reports.append(run.stepper.run(0, [run.loader.next() for _ in range(3)]))
    for key in ("loss", "distillation", "relational", "gate_mean", "grad_norm"):
        assert getattr(reports[1], key) == pytest.approx(getattr(reports[0], key), rel=1e-4), key


def test_a_resumed_run_wants_the_same_cache(world: Path, tmp_path: Path) -> None:
    settings = {"runtime__checkpoint_every_steps": 1, "optim__num_steps": 3}
    build_cache(recipe(world), tmp_path / "cache")
    made = cached(world, tmp_path / "cache", **settings)
    train(made, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "cache")
    build_cache(recipe(world), tmp_path / "cache", "bf16")
    with pytest.raises(CheckpointError, match=r"teacher_cache: [0-9a-f]{16} then, [0-9a-f]{16} now"):
        train(made, tmp_path / "run", resume=True)


def test_workers_make_the_same_cache(world: Path, tmp_path: Path) -> None:
    build_cache(recipe(world, data__workers=2), tmp_path / "cache")
    names = ("shards/shard-000000/entries.safetensors", "ledger.jsonl", "cache.json", "head/head.safetensors")
    for name in names:
        assert (tmp_path / "cache" / name).read_bytes() == (world / "cache" / name).read_bytes(), name


def test_a_teacher_without_a_manifest_has_the_same_weights(world: Path, tmp_path: Path) -> None:
    """What a manifest says of the files is what hashing them says."""
    shutil.copytree(world / "teacher", tmp_path / "bare")
    for name in ("manifest.json", "manifest.sha256"):
        (tmp_path / "bare" / name).unlink()
    found = [weights_of(recipe(world), str(folder)) for folder in (world / "teacher", tmp_path / "bare")]
    assert found[0] == found[1]
    assert known_weights(recipe(world), str(tmp_path / "bare")) is None
    config = (tmp_path / "bare" / "config.json").read_text()
    (tmp_path / "bare" / "config.json").write_text(config + " ")
    assert weights_of(recipe(world), str(tmp_path / "bare")) != found[0]
