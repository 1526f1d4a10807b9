"""``grace analyze`` on a small world: every part, what is left out without a model, and errors of one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from toy_run import write_models, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from grace_vlm.ptq.quantize import quantize_folder

    folder = tmp_path_factory.mktemp("analyze")
    write_rows(folder)
    write_models(folder)
    quantize_folder(str(folder / "student"), folder / "w4", "w4g64")
    return folder


def words(world: Path, model: str, out: Path, *more: object) -> tuple[object, ...]:
    return ("analyze", world / model, "--data", world / "rows.jsonl", "--out", out, "--device", "cpu", *more)


def test_every_part(world: Path, grace: Any, tmp_path: Path) -> None:
    models = ("--teacher", world / "teacher", "--before", world / "student")
    code, out, err = grace(*words(world, "w4", tmp_path, *models, "--limit", 20, "--linears"))
    assert (code, err) == (0, "")
    assert f"page: {tmp_path / 'index.html'}" in out
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert result["left_out"] == []
    assert result["data"]["num_rows"] == 20
    assert result["entropy"]["first"]["num_tokens"] == 20
    assert result["entropy"]["all"]["num_rows"] == 20
    assert sum(result["gate"]["counts"]) == result["entropy"]["all"]["num_tokens"] == result["layers"]["num_tokens"]
    assert result["cka"]["num_pictures"] == 20
    assert (len(result["cka"]["matrix"]), len(result["cka"]["matrix"][0])) == (3, 3)
    assert [layer["layer"] for layer in result["layers"]["layers"]] == [0, 1]
    assert all(layer["kl"] > 0 < layer["output_error"] for layer in result["layers"]["layers"])
    assert len(result["layers"]["linears"]) == 14
    assert all(one["kl"] > 0 for one in result["layers"]["linears"])
    codes = result["codes"]["schemes"]["w4g64"]
    assert (
        codes["num_codes"] == sum(codes["counts"]) == sum(o["num_codes"] for o in result["codes"]["linears"].values())
    )
    pictures = {path.name for path in tmp_path.glob("*.svg")}
    assert pictures >= {
        "gate.svg",
        "cka.svg",
        "cka_states.svg",
        "layers.svg",
        "effect.svg",
        "linears.svg",
        "codes_w4g64.svg",
    }
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure>") == len(pictures)
    assert not re.search(r"(src|href)=.?(?!data:|#)[a-z]", page), "the page loads something"


def test_the_same_rows_give_the_same_bytes(world: Path, grace: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert grace(*words(world, "w4", tmp_path / name, "--before", world / "student", "--limit", 6))[0] == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_parts_that_lack_a_model_are_said(world: Path, grace: Any, tmp_path: Path) -> None:
    code, out, err = grace(*words(world, "student", tmp_path, "--json", "--limit", 2))
    assert code == 0
    assert err.splitlines() == [
        "Entropy against error, the gate and CKA are left out: they need --teacher.",
        "The effect of each layer, and CKA before, are left out: they need --before.",
        f"Codes and the effect of each layer are left out: {world / 'student'} has no grid.",
    ]
    found = json.loads(out)
    assert [found[part] for part in ("entropy", "gate", "cka", "cka_before", "layers", "codes")] == [None] * 6
    assert not list(tmp_path.glob("*.svg"))
    assert (tmp_path / "index.html").is_file()


def test_the_unquantized_model_before_itself(world: Path, grace: Any, tmp_path: Path) -> None:
    """CKA before and after are of one model; without a grid no layer is looked at."""
    models = ("--teacher", world / "teacher", "--before", world / "student")
    code, out, _ = grace(*words(world, "student", tmp_path, *models, "--json", "--limit", 4))
    found = json.loads(out)
    assert code == 0
    assert found["cka"] == found["cka_before"]
    assert found["layers"] is None


def test_errors(world: Path, grace: Any, tmp_path: Path) -> None:
    code, _, err = grace(*words(world, "w4", tmp_path / "none", "--linears"))
    line = "error: --linears compares with the student before it was quantized; give --before\n"
    assert (code, err) == (2, line)
    code, _, err = grace(*words(world, "w4", tmp_path, "--limit", 0))
    assert (code, err) == (2, "error: --limit is 0; at least 1 row is needed to look at\n")
    code, _, err = grace(*words(world, "nowhere", tmp_path))
    assert code == 2
    assert err.startswith(f"error: {world / 'nowhere'} does not exist; expected a model folder")
    assert not (tmp_path / "analysis.json").exists()
