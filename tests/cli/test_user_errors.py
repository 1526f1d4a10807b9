"""Every user error: one line, word for word, an exit code, nothing half-written."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.cli.main import main
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, rows, a recipe, and a finished two-step run with its checkpoint."""
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder)
    write_models(folder)
    tree = recipe_tree(folder, optim__num_steps=2)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    train(recipe_from(tree, "test"), folder / "run")
    return folder


def grace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "argv", ["grace", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command that must fail with exactly this line on standard error and nothing on standard output."""

    def run(code: int, line: str, *args: object) -> None:
        found, out, err = grace(capsys, monkeypatch, *args)
        assert (err, out, found) == (f"error: {line}\n", "", code)

    return run


def test_a_command_that_is_nearly_one(fails: Any) -> None:
    fails(2, "No such command 'trian'. Did you mean 'train'? see grace --help", "trian")


def test_a_demo_of_no_teacher_makes_nothing(fails: Any, tmp_path: Path) -> None:
    line = "nope does not exist; expected a model folder, a run folder or a hub id like org/name"
    fails(2, line, "demo", "--teacher", "nope", "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_unknown_recipe_key(world: Path, fails: Any) -> None:
    where = world / "recipe.yaml"
    guess = "did you mean optim.learning_rate? see docs/recipes.md for the keys there are"
    line = f"unknown key optim.learning_rat on the command line; {guess}"
    fails(2, line, "train", where, "optim.learning_rat=1", "--out", world / "x")
    assert not (world / "x").exists()


def test_missing_recipe(world: Path, fails: Any) -> None:
    line = "recipe nowhere.yaml does not exist; see recipes/ for those that ship"
    fails(2, line, "train", "nowhere.yaml", "--out", world / "x")


def test_missing_field(world: Path, fails: Any) -> None:
    tree = recipe_tree(world)
    del tree["data"]["train"]
    where = world / "incomplete.yaml"
    where.write_text(yaml.safe_dump(tree))
    line = f"{where} lacks the key data.train; add it or pass data.train=VALUE"
    fails(2, line, "train", where, "--out", world / "x")


def test_wrong_value(world: Path, fails: Any) -> None:
    line = "optim.num_steps on the command line is 0: input should be greater than or equal to 1"
    fails(2, line, "train", world / "recipe.yaml", "optim.num_steps=0", "--out", world / "x")


def test_wrong_model_path(world: Path, fails: Any) -> None:
    line = f"{world}/nobody does not exist; expected a model folder, a run folder or a hub id like org/name"
    fails(2, line, "eval", world / "nobody", "--data", world / "rows.jsonl")
    fails(2, line, "train", world / "recipe.yaml", f"model.student={world}/nobody", "--out", world / "x")


def test_wrong_data_path(world: Path, fails: Any) -> None:
    line = f"{world}/no.jsonl is no file; a JSON array or JSONL file of LLaVA rows is expected"
    fails(3, line, "eval", world / "student", "--data", world / "no.jsonl")


def test_method_that_the_scheme_excludes(world: Path, fails: Any) -> None:
    recipe, out = world / "recipe.yaml", world / "x"
    line = "method sft trains in bf16, scheme is w4g128; use method=qat or scheme=bf16"
    fails(2, line, "train", recipe, "method=sft", "--out", out)
    line = "method qat needs a grid, scheme is bf16; use scheme=w4g128 or method=sft"
    fails(2, line, "train", recipe, "method=qat", "scheme=bf16", "--out", out)
    line = "method kd needs a teacher; set model.teacher to a model folder"
    fails(2, line, "train", recipe, "method=kd", "model.teacher=null", "--out", out)


def test_group_size_that_does_not_divide(world: Path, fails: Any) -> None:
    line = "group size 96 does not divide in_features 128 of model.language_model.layers.0.self_attn.q_proj; use w4g128"
    fails(2, line, "quantize", world / "student", world / "x", "--scheme", "w4g96")
    fails(2, line, "train", world / "recipe.yaml", "scheme=w4g96", "--out", world / "y")
    assert not (world / "x").exists()


def test_pattern_that_matches_nothing(world: Path, fails: Any) -> None:
    line = (
        "pattern 'nothing' matches none of the 27 linears; names look like 'model.visual.blocks.0.attn.qkv' "
        "(see grace inspect)"
    )
    fails(2, line, "train", world / "recipe.yaml", "quant.overrides={nothing: w8g128}", "--out", world / "z")


def test_unknown_scheme(world: Path, fails: Any) -> None:
    line = "unknown scheme 'int4'; expected bf16 or w{8,4,3,2}g{N}, for example w4g128"
    fails(2, line, "quantize", world / "student", world / "x", "--scheme", "int4")


def test_not_an_image(world: Path, fails: Any, tmp_path: Path) -> None:
    page = tmp_path / "cat.png"
    page.write_text("<html>")
    line = f"{page}: the file is none of JPEG, PNG, WEBP, GIF"
    fails(7, line, "chat", world / "student", "--image", page, "--question", "what is this?")


def test_bad_row_in_an_evaluation(world: Path, fails: Any, tmp_path: Path) -> None:
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(world / "rows.jsonl", tmp_path)
    (tmp_path / "images" / "3.png").write_bytes(b"")
    line = (
        "row 3 ('r3') is bad, image_empty: 'images/3.png': the file has 0 bytes; 1 bad rows of 24 are over the "
        "budget of 0 (0 of the rows); list them with 'grace data check', then repair them"
    )
    fails(3, line, "eval", world / "student", "--data", tmp_path / "rows.jsonl")


def test_a_question_without_room_for_its_answer(world: Path, fails: Any) -> None:
    line = (
        "row 0 ('r0') has a prompt of 42 tokens and an answer may have 2,040; the model takes 2,048 in all: shorten "
        "one of them"
    )
    fails(3, line, "eval", world / "student", "--data", world / "rows.jsonl", "--max-new-tokens", 2040)


def test_activations_that_there_are_none_of(world: Path, fails: Any) -> None:
    line = "cpu_activations is 'int4'; expected int8 or fp32"
    rows = ("--data", world / "rows.jsonl", "--cpu-activations", "int4")
    fails(2, line, "eval", world / "student", *rows)
    fails(2, line, "compare", world / "student", world / "teacher", *rows, "--out", world / "compared")
    assert not (world / "compared").exists()


def test_a_comparison_into_a_file(world: Path, fails: Any) -> None:
    (world / "file").write_text("a")
    reason = "a part of the path is a file; what was there before is untouched"
    line = f"cannot write {world / 'file' / 'answers'}: {reason}"
    both = (world / "student", world / "teacher", "--data", world / "rows.jsonl")
    fails(5, line, "compare", *both, "--out", world / "file")


def test_a_comparison_with_a_model_that_is_not_there(world: Path, fails: Any, tmp_path: Path) -> None:
    line = f"{tmp_path / 'gone'} does not exist; expected a model folder, a run folder or a hub id like org/name"
    both = (world / "student", tmp_path / "gone", "--data", world / "rows.jsonl")
    fails(2, line, "compare", *both, "--out", tmp_path / "page")
    assert not (tmp_path / "page").exists(), "nobody was asked"


def test_existing_output(world: Path, fails: Any) -> None:
    before = sorted((world / "run").rglob("*"))
    line = f"{world}/run exists; pass --resume to go on, --overwrite to start again, or another --out"
    fails(5, line, "train", world / "recipe.yaml", "--out", world / "run")
    assert sorted((world / "run").rglob("*")) == before


def test_overwrite_spares_what_is_no_run(world: Path, fails: Any, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    line = f"{tmp_path} is no run folder (no config.yaml); it is not overwritten: choose another --out"
    fails(5, line, "train", world / "recipe.yaml", "--out", tmp_path, "--overwrite")
    assert (tmp_path / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_a_model_is_no_run_to_go_on_with(world: Path, fails: Any, tmp_path: Path, flags: tuple[str, ...]) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "student", model)
    before = sorted(model.rglob("*"))
    line = f"{model} is a model folder and no run; it is left as it is: choose another --out"
    fails(5, line, "train", world / "recipe.yaml", "--out", model, *flags)
    assert sorted(model.rglob("*")) == before


def test_resume_with_another_recipe(world: Path, fails: Any) -> None:
    line = f"{world}/run is a finished run of another recipe; choose another --out or --overwrite"
    fails(5, line, "train", world / "recipe.yaml", "optim.num_steps=3", "--out", world / "run", "--resume")


def test_checkpoint_with_one_flipped_bit(world: Path, tmp_path: Path, fails: Any) -> None:
    checkpoint = tmp_path / "step-000001"
    shutil.copytree(world / "run" / "checkpoints" / "step-000001", checkpoint)
    file = checkpoint / "masters.safetensors"
    data = bytearray(file.read_bytes())
    before = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    line = (
        f"{file} is corrupt: sha256 is {hashlib.sha256(data).hexdigest()}, its manifest says {before}; "
        "use another copy or an earlier checkpoint"
    )
    fails(5, line, "inspect", checkpoint)


def test_no_room_on_the_disk(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before a byte is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    folder = tmp_path / "q"
    code, out, error = grace(capsys, monkeypatch, "quantize", world / "student", folder, "--scheme", "w4g128")
    whole = rf"error: cannot write {folder}: [1-9][0-9,]+ bytes needed, 0 free; make room or write elsewhere\n"
    assert re.fullmatch(whole, error)
    assert (code, out, os.listdir(tmp_path)) == (5, "", [])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_disk_that_fills_up(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real full disk that is only noticed while writing."""
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("not allowed to mount here")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        folder = tmp_path / "q"
        code, out, error = grace(capsys, monkeypatch, "quantize", world / "student", folder, "--scheme", "w4g128")
        reason = r"the disk is full \([0-9,]+ bytes needed\); what was there before is untouched"
        assert re.fullmatch(rf"error: cannot write {folder}: {reason}\n", error)
        assert (code, out, os.listdir(tmp_path)) == (5, "", [])
    finally:
        os.system(f"umount {tmp_path} 2>/dev/null")


def test_usage_errors_are_lines_too(world: Path, fails: Any) -> None:
    fails(2, "No such command 'nosuch'; see grace --help", "nosuch")
    fails(
        2,
        "Missing argument 'src' (Quantized model folder of any readable layout, or run folder); see grace pack --help",
        "pack",
    )
    fails(2, "Missing argument 'file' (Rows: JSON array or JSONL); see grace data check --help", "data", "check")
    fails(2, "No such command 'nosuch'; see grace data --help", "data", "nosuch")


def test_parts_that_there_are_none_of(world: Path, fails: Any) -> None:
    suite = ("eval", world / "student", "--data", world, "--suite", "card", "--out", world / "scored")
    fails(2, "--part is 5/4, part 5 of 4; parts of 4 have numbers from 1 to 4", *suite, "--part", "5/4")
    fails(2, "--part is 0/4, part 0 of 4; parts of 4 have numbers from 1 to 4", *suite, "--part", "0/4")
    fails(2, "--part is 2/0, of 0 parts; expected a number of so many, for example 2/4", *suite, "--part", "2/0")
    fails(2, "--part is 2; expected a number of so many, for example 2/4", *suite, "--part", "2")
    assert not (world / "scored").exists()


def test_pack_refuses_what_has_no_grid(world: Path, fails: Any) -> None:
    line = f"{world}/student has no grid, so there is nothing to pack; quantize it first (grace quantize)"
    fails(4, line, "pack", world / "student", world / "packed")
    assert not (world / "packed").exists()


def test_a_demo_folder_of_other_inputs(world: Path, fails: Any, tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text('{"teacher": "other", "student": "mine", "steps": null}')
    line = (
        f"{tmp_path} is a demo of other inputs (teacher was other, now nowhere; steps was None, now 7); "
        "choose another --out or remove it"
    )
    fails(5, line, "demo", "--out", tmp_path, "--teacher", "nowhere", "--student", "mine", "--steps", "7")
    assert os.listdir(tmp_path) == ["inputs.json"]


def test_a_demo_outside_a_clone(fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "recipes/toy_qat_w4g128.yaml does not exist; run grace demo in a clone of the repository"
    fails(2, line, "demo")
    assert os.listdir(tmp_path) == []
