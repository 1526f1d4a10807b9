"""The same seed gives the same bytes, another one others; the manifest is true; a folder is complete or untouched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_rows

from grace_vlm.cli import main as cli
from grace_vlm.errors import CheckpointError, ConfigError
from grace_vlm.evals.toy.suite import BENCHMARKS, read_manifest, write_toy_suite


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_in_another_process(suite: Path, tmp_path: Path) -> None:
    """Another order of sets and dictionaries, another working folder."""
    code = "import sys; from pathlib import Path; from grace_vlm.evals.toy.suite import write_toy_suite; "
    code += "write_toy_suite(Path('again'), seed=0)"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert contents(tmp_path / "again") == contents(suite)


def test_another_seed_asks_of_other_pictures(suite: Path, tmp_path: Path) -> None:
    write_toy_suite(tmp_path / "other", seed=1)
    assert read_manifest(tmp_path / "other")["seed"] == 1
    first, second = contents(suite), contents(tmp_path / "other")
    assert {name for name in first if name.endswith((".parquet", ".tsv"))} <= {
        n for n in second if first.get(n) != second[n]
    }
    shown = [{png for _, png, _ in toy_rows.asked(folder)} for folder in (suite, tmp_path / "other")]
    assert len(shown[0] & shown[1]) <= 10, "easy-VQA's pictures, and a pattern or two, may come again"


def test_the_manifest_is_true(suite: Path) -> None:
    manifest = read_manifest(suite)
    assert (manifest["source"], manifest["seed"]) == ("toy-suite", 0)
    assert tuple(manifest["benchmarks"]) == BENCHMARKS
    rows = {name: one["counts"]["rows"] for name, one in manifest["benchmarks"].items()}
    assert rows == {
        "hallusion": 240,
        "mmbench": 370,
        "scienceqa": 150,
        "ai2d": 120,
        "mmmu": 90,
        "seed": 180,
        "mmstar": 108,
    }
    files = contents(suite)
    told = {
        f"{name}/{path}": digest
        for name, one in manifest["benchmarks"].items()
        for path, digest in one["sha256"].items()
    }
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in told} == told
    single = {"scienceqa": "images/", "seed": "SEED-Bench-image/"}
    assert set(files) - set(told) - {"README.md", "manifest.json"} == {
        name for name in files if any(name.startswith(f"{one}/{folder}") for one, folder in single.items())
    }
    for name, folder in single.items():
        digest, members = hashlib.sha256(), sorted(path for path in files if path.startswith(f"{name}/{folder}"))
        for path in members:
            digest.update(path.removeprefix(f"{name}/").encode() + hashlib.sha256(files[path]).digest())
        assert manifest["benchmarks"][name]["num_picture_files"] == len(members)
        assert manifest["benchmarks"][name]["pictures_sha256"] == digest.hexdigest()
    counts = {name: one["counts"] for name, one in manifest["benchmarks"].items()}
    pngs = [row[f"image_{n}"] for row in toy_rows.mmmu(suite) for n in range(1, 8) if row[f"image_{n}"]]
    assert counts["mmmu"] == {"rows": 90, "pictures": len(pngs), "open": 15}
    assert counts["hallusion"] == {"rows": 240, "pictures": 72, "text_only": 24, "questions": 108}


def test_no_question_is_asked_twice_of_a_picture(suite: Path) -> None:
    """Rotations and masked forms aside; an edited picture is another one."""
    asked = {(question, png) for question, png, _ in toy_rows.asked(suite)}
    num_rotations = 370 - 100
    assert len(list(toy_rows.asked(suite))) - num_rotations == len(asked)


def test_hugging_faces_datasets_reads_it(suite: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = str(suite / "mmstar" / "mmstar.parquet")
    table = datasets.Dataset.from_parquet(file, cache_dir=str(suite.parent / "cache"))
    assert isinstance(table.features["image"], datasets.Image)
    assert table[0]["image"].size == (128, 128)
    assert table[0]["meta_info"]["split"] == "val"
    options = datasets.Dataset.from_parquet(
        str(suite / "ai2d" / "masked" / "test-00000-of-00001.parquet"), cache_dir=str(suite.parent / "cache")
    )[0]["options"]
    assert len(options) == 4


# --- what it refuses ---


def test_a_folder_is_replaced_only_if_asked_and_if_it_is_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError) as error:
        write_toy_suite(mine)
    assert str(error.value) == f"{mine} already exists; choose another path or pass --overwrite"
    with pytest.raises(CheckpointError) as error:
        write_toy_suite(mine, overwrite=True)
    assert str(error.value) == (
        f"{mine} was not made by grace (no manifest.json); delete it yourself or give another folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (mine / "letter.txt").read_text() == "dear"


def test_without_pyarrow_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError) as error:
        write_toy_suite(tmp_path / "out")
    assert str(error.value) == (
        "the toy suite has Parquet files and needs the package pyarrow, which is not installed; pip install pyarrow"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_command(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: Any) -> str:
        cli.app(["data", "prepare", "toy-suite", str(tmp_path / "out"), *words], standalone_mode=False)
        return capsys.readouterr().out

    document = json.loads(run("--json"))
    assert document == {"out": str(tmp_path / "out"), **read_manifest(suite)}
    (tmp_path / "out" / "mmstar" / "MMStar.tsv").unlink()
    lines = run("--overwrite").splitlines()
    assert [line.split() for line in lines[:1] + lines[2:]] == [
        ["benchmark", "rows", "pictures"],
        *[
            [name, str(one["counts"]["rows"]), str(one["counts"]["pictures"])]
            for name, one in document["benchmarks"].items()
        ],
    ]
    assert contents(tmp_path / "out") == contents(suite)
