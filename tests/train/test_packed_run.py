"""A packed run is the padded run: the same loss, gradients and resumed bytes on the same samples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import Run, train
from grace_vlm.train.record import read_metrics


def write_mixed_rows(folder: Path) -> Path:
    """Beside the rows of one picture: text only, several turns, several pictures, and two that are bad."""
    path = write_rows(folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def add(name: str, images: list[str], *texts: str) -> None:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        rows.append({"id": name, "image": images, "conversations": turns})

    for number in range(6):
        add(f"text{number}", [], "what color?", "red", "and now?" * (number + 1), "blue")
        pair = [f"images/{number}.png", f"images/{number + 1}.png"]
        add(f"pair{number}", pair, "is <image> like <image>?", "no", "why?", "color")
    Image.new("RGB", (256, 160), "green").save(folder / "images" / "wide.png")
    add(
        "three", ["images/wide.png", "images/0.png", "images/wide.png"], "<image> <image>", "green", "<image>?", "green"
    )
    add("gone", ["images/0.png", "images/never.png"], "<image><image> same?", "no")
    add("short", ["images/0.png", "images/1.png"], "<image> same?", "no")
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    write_mixed_rows(folder)
    write_models(folder)
    return folder


def recipe(folder: Path, **overrides: Any) -> Recipe:
    settings = {"runtime__checkpoint_every_steps": 0, "data__max_bad_fraction": 0.1, **overrides}
    settings.setdefault("runtime__tower_cache_gib", 0)
    return recipe_from(recipe_tree(folder, **settings), "test")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_padded_give_the_same_step(world: Path, tmp_path: Path, checkpointing: bool) -> None:
    """2 micro-batches of 5 rows with every term of GRACE: loss, every term, gradients, one step's weights."""
    found = {}
    for packing in (False, True):
        options = {
            "data__packing": packing,
            "data__micro_batch_size": 5,
            "runtime__gradient_checkpointing": checkpointing,
        }
        run = Run(recipe(world, loss__relational_warmup_steps=0, **options), tmp_path / str(packing))
        batches = [run.loader.next() for _ in range(2)]
        assert any(len(batch.pictures) > len(batch.sample_ids) for batch in batches), "rows of several pictures"
        report = run.stepper.run(0, batches)
        found[packing] = (report, dict(run.masters.masters()), batches)
    padded, packed = found[False][0], found[True][0]
    assert packed.tokens < padded.tokens
    for name in ("loss", "cross_entropy", "distillation", "relational", "gate_mean", "grad_norm"):
        assert getattr(packed, name) == pytest.approx(getattr(padded, name), rel=2e-5), name
    assert (packed.supervised_tokens, packed.images) == (padded.supervised_tokens, padded.images)
    for name, master in found[True][1].items():
        other = found[False][1][name]
        # Adam divides by the root of a gradient's square: a component at rounding level may take a step either way.
        assert float((master - other).abs().max()) <= 2.1 * 1e-3, name
        assert float(((master - other).abs() > 1e-5).float().mean()) < 0.01, name


def test_the_ledger_of_a_run_names_rows_of_several_pictures(world: Path, tmp_path: Path) -> None:
    for workers, packing in ((0, False), (2, True)):
        out = tmp_path / f"{workers}"
        settings = {"data__workers": workers, "data__packing": packing, "data__micro_batch_size": 8}
        train(recipe(world, optim__num_steps=3, data__accumulation=2, **settings), out)
        lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
        assert {(line["id"], line["kind"]) for line in lines} == {
            ("gone", "image_missing"),
            ("short", "too_few_image_tokens"),
        }
    assert (tmp_path / "0" / "ledger.jsonl").read_bytes() == (tmp_path / "2" / "ledger.jsonl").read_bytes()


def digest(folder: Path) -> str:
    files = sorted(path for path in (folder / "final").rglob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (3, 1), (5, 0)])
def test_a_packed_run_resumes_bit_for_bit_inside_an_epoch(world: Path, tmp_path: Path, stop: int, workers: int) -> None:
    packed = {"data__packing": True, "data__max_tokens": 256, "data__max_batch_tokens": 256, "data__workers": workers}
    settings = {**packed, "runtime__checkpoint_every_steps": 1, "optim__num_steps": 6}
    whole = tmp_path / "whole"
    train(recipe(world, **settings), whole)

    class Stopped(Exception):
        pass

    def until(report: Any, num_steps: int) -> None:
        if report.step == stop:
            raise Stopped

    cut = tmp_path / "cut"
    with pytest.raises(Stopped):
        train(recipe(world, **settings), cut, progress=until)
    train(recipe(world, **settings), cut, resume=True)
    assert digest(whole) == digest(cut)
    losses = [[line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (whole, cut)]
    assert losses[0] == losses[1]


def test_what_cannot_be_honoured_is_refused(world: Path) -> None:
    def error(**overrides: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            recipe(world, **overrides)
        return str(caught.value)

    assert error(data__max_batch_tokens=4096) == (
        "data.max_batch_tokens is for packed rows; set data.packing=true or leave it out"
    )
    assert error(data__packing=True, data__max_batch_tokens=4096) == (
        "data.max_batch_tokens is 4096 and a row may have 8192 (data.max_tokens); "
        "a micro-batch must hold the longest row"
    )
    assert error(data__packing=True, data__group_by_length=True) == (
        "data.group_by_length saves padding and packing has none; choose one of them"
    )
    assert error(data__workers=2, runtime__tower_cache_gib=0.1) == (
        "data.workers read every row anew and cannot share data.pixel_cache_gib, data.samples_kept or "
        "runtime.tower_cache_gib; set those to 0 or data.workers=0"
    )


def test_pixel_limits_hold_in_training_and_leave_the_processor_alone(world: Path, tmp_path: Path) -> None:
    limits = {"data__min_pixels": 96 * 96, "data__max_pixels": 96 * 96}
    run = Run(recipe(world, **limits), tmp_path / "small")
    batch = run.loader.next()
    assert {picture.grid for picture in batch.pictures} == {(1, 6, 6)}
    before = dict(run.student.processor.image_processor.size)
    assert before["shortest_edge"] == 128 * 128
    with pytest.raises(ConfigError, match=r"data\.min_pixels is 20000 and data\.max_pixels 10000"):
        Run(recipe(world, data__min_pixels=20000, data__max_pixels=10000), tmp_path / "wrong")
    assert torch.is_tensor(batch.pictures[0].pixels)
