"""Every command on a small world: what it prints, its --json document, its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.cli.doctor import PACKAGES
from grace_vlm.cli.main import main
from grace_vlm.kernels.cpu import why_not


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_rows(folder)
    write_models(folder)
    tree = recipe_tree(folder, optim__num_steps=3, runtime__checkpoint_every_steps=2)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture
def grace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command; returns (exit code, standard output)."""

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["grace", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().out

    return run


@pytest.fixture
def document(grace: Any) -> Any:
    """Run a command with --json, which must succeed; returns its one document."""

    def run(*args: object) -> Any:
        code, out = grace(*args, "--json")
        assert code == 0, out
        return json.loads(out)

    return run


@pytest.mark.parametrize(
    ("given", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_spin_briefly_unless_told_otherwise(given: dict[str, str], found: str) -> None:
    """Set while torch can still read it."""
    code = (
        "import os, sys\nsys.argv = ['grace', '--version']\nfrom grace_vlm.cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "try: main()\nexcept SystemExit: print(os.environ.get('GOMP_SPINCOUNT'))\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines()[-1] == found


def test_train_pack_verify_eval(world: Path, grace: Any, document: Any) -> None:
    run, packed, official = world / "run", world / "packed", world / "official"
    trained = document("train", world / "recipe.yaml", "--out", run)
    assert trained["model"] == str(run / "final")
    assert trained["last_step"]["step"] == 2
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "ledger.jsonl",
        "checkpoints",
        "final",
    }
    assert grace("train", world / "recipe.yaml", "--out", run, "--resume")[0] == 0
    assert document("pack", run, packed)["format"] == "compressed-tensors"
    assert document("pack", run, official, "--format", "official")["bytes"] > 0
    for other in (packed, official):
        assert document("verify", run, other)["equal"] is True
    code, out = grace("verify", run, packed)
    assert (code, out.split(":")[0]) == (0, "equal")
    answers = world / "answers.jsonl"
    scored = document("eval", packed, "--data", world / "rows.jsonl", "--limit", 5, "--answers", answers)
    assert (scored["num_scored"], scored["num_total"], len(answers.read_text().splitlines())) == (5, 5, 5)
    before = answers.read_bytes()
    code, _ = grace("eval", packed, "--data", world / "rows.jsonl", "--limit", 2, "--answers", answers)
    assert (code, answers.read_bytes()) == (5, before), "what was answered is not replaced"
    assert document("eval", official, "--data", world / "rows.jsonl", "--limit", 5)["kinds"] == scored["kinds"]
    options = ("--limit", 5, "--cpu-activations", "int8", "--batch-size", 2, "--max-new-tokens", 3)
    assert document("eval", run, "--data", world / "rows.jsonl", *options)["num_scored"] == 5
    code, out = grace("eval", run, "--data", world / "rows.jsonl", "--limit", 5)
    assert out.splitlines()[-1].startswith("accuracy ")


def test_verify_names_the_first_difference(world: Path, grace: Any, document: Any) -> None:
    for scale in ("minmax", "mse"):
        document("quantize", world / "student", world / scale, "--scheme", "w4g64", "--scale", scale)
    code, out = grace("verify", world / "minmax", world / "mse")
    assert code == 1
    assert out.startswith("different: ")
    assert "model.language_model.layers.0." in out


def test_verify_of_two_without_a_grid_says_so(world: Path, grace: Any) -> None:
    shutil.copytree(world / "student", world / "twin")
    said = r"equal by value, but neither has a grid \(no codes, no scales\): 63 tensors \([1-9][0-9,]+ values\)\n"
    code, out = grace("verify", world / "student", world / "twin")
    assert re.fullmatch(said, out)
    assert code == 0
    weights = load_file(world / "twin" / "model.safetensors")
    next(tensor for name, tensor in sorted(weights.items()) if name.endswith("norm.weight"))[3] += 1
    save_file(weights, world / "twin" / "model.safetensors", {"format": "pt"})
    code, out = grace("verify", world / "student", world / "twin")
    assert code == 1
    assert out.startswith("different: 1 tensors or settings; the first is model.language_model.")


def test_plan_lists_every_linear(world: Path, grace: Any, document: Any) -> None:
    plan = document("train", world / "recipe.yaml", "--out", world / "never", "--plan")
    assert len(plan["linears"]) == 14
    assert len(plan["linears"]) + len(plan["bf16"]) == 27
    out = grace("train", world / "recipe.yaml", "--out", world / "never", "--plan")[1]
    assert len(out.splitlines()) == 28 + 2, "27 linears and the embedding"
    assert not (world / "never").exists()


def test_inspect(world: Path, grace: Any, document: Any) -> None:
    document("quantize", world / "student", world / "q8", "--scheme", "w8g128")
    found = document("inspect", world / "q8")
    assert (found["kind"], found["layout"], found["quantized_linears"]) == ("model", "grace", 14)
    assert document("inspect", world / "student")["layout"] == "bf16"
    assert "w8g128" in grace("inspect", world / "q8")[1]
    said = grace("inspect", world / "student")[1]
    assert "layout: bf16" in said
    assert not [word for word in ("None", "{}", "bf16_linears") if word in said], "it has no grid to speak of"


class Bar:
    """Stands for the terminal's bar and keeps what it is told."""

    def __init__(self, description: str) -> None:
        self.calls: list[tuple[int, int]] = []
        BARS.append((description, self.calls))

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, done: int, total: int) -> None:
        self.calls.append((done, total))


BARS: list[tuple[str, list[tuple[int, int]]]] = []


def test_verify_and_inspect_show_how_far_they_are(world: Path, document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document("quantize", world / "student", world / "barred", "--scheme", "w4g64")
    document("pack", world / "barred", world / "barred-official", "--format", "official")
    for command in ("verify", "inspect"):
        monkeypatch.setattr(f"grace_vlm.cli.{command}.ProgressBar", Bar)
    BARS.clear()
    assert document("verify", world / "barred", world / "barred-official")["equal"] is True
    document("inspect", world / "barred-official")
    assert [description for description, _ in BARS] == ["comparing", "reading"]
    for _, calls in BARS:
        dones = [done for done, _ in calls]
        assert len(calls) >= 14
        assert dones == sorted(dones)
        assert calls[-1][0] == calls[-1][1] > 100_000


def test_data_prepare_and_check(world: Path, grace: Any, document: Any) -> None:
    made = document("data", "prepare", "easy-vqa", world / "easy")
    assert sum(made["num_rows"].values()) == 48_248
    found = document("data", "check", world / "rows.jsonl", "--ledger", world / "ledger.jsonl")
    assert (found["num_rows"], found["faults"]) == (24, [])
    (world / "bad.jsonl").write_text((world / "rows.jsonl").read_text() + "{\n")
    code, out = grace("data", "check", world / "bad.jsonl", "--root", world)
    assert code == 3
    assert out.startswith("row 24 (''): bad_json: ")
    (world / "bad.jsonl").write_text("{\n" * 25)
    assert "... and 5 more; --ledger FILE has all\n" in grace("data", "check", world / "bad.jsonl")[1]


def test_chat(world: Path, grace: Any, document: Any) -> None:
    args = ("chat", world / "student", "--image", world / "images" / "0.png", "--question", "what color?")
    answer = document(*args, "--max-new-tokens", 4)["answer"]
    assert grace(*args, "--max-new-tokens", 4) == (0, answer + "\n")


def test_compare_and_its_page(world: Path, grace: Any, document: Any) -> None:
    out = world / "page"
    found = document("compare", world / "student", world / "teacher", "--data", world / "rows.jsonl", "--out", out)
    assert [row["name"] for row in found["rows"]] == ["student", "teacher"]
    page = (out / "report.html").read_text()
    assert "teacher" in page
    assert "<script" not in page
    assert document("compare", out)["rows"] == found["rows"]
    assert json.loads((out / "results.json").read_text())["command"] == "grace compare"
    rounded = (world / "student", "--data", world / "rows.jsonl", "--cpu-activations", "int8", "--out", world / "int8")
    document("compare", *rounded)
    assert (
        json.loads((world / "int8" / "results.json").read_text())["command"] == "grace compare --cpu-activations int8"
    )


def test_doctor(grace: Any, document: Any) -> None:
    found = document("doctor")
    assert found["low_bit_on_cpu"] in ("a kernel from codes", f"{why_not()}: weights are multiplied in FP32")
    assert found["packages"]["torch"]
    assert "torch" in grace("doctor")[1]


def test_doctor_knows_every_extra() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    brought = {
        (re.split("[>;]", one)[0].strip(), extra) for extra in extras.keys() - {"dev", "lmms"} for one in extras[extra]
    }
    told = {(name, extra) for name, (of, _) in PACKAGES.items() for extra in of.split(", ") if extra}
    assert told == brought


def test_help_answers_at_once() -> None:
    """Half a second, without importing torch; the best of three, since other programs share the machine."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "grace_vlm.cli.main", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5
