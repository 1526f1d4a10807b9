"""``grace data prepare`` of downloads: the table, the line to train with, options that belong to no source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace_vlm.cli import main as cli
from grace_vlm.errors import GraceError


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "data" / "coco" / "train2017").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "coco" / "train2017" / "1.jpg")
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": 1, "image": f"coco/train2017/{name}.jpg", "conversations": turns} for name in (1, 2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def grace(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> tuple[str, str]:
        """(standard output, the error's line or nothing)."""
        try:
            cli.app([str(word) for word in words], standalone_mode=False)
        except GraceError as error:
            return capsys.readouterr().out, str(error)
        return capsys.readouterr().out, ""

    return run


def test_the_table_and_the_line_to_train_with(world: Path, grace: Any) -> None:
    places = ("--annotations", world / "rows.json", "--images", world / "data")
    out, error = grace("data", "prepare", "llava", world / "out", *places)
    assert error.endswith("most in coco/train2017: 1 of 2; download them, or pass --skip-missing to leave out 1 row")
    assert next(line.split() for line in out.splitlines() if line.startswith("coco")) == [
        "coco/train2017",
        "2",
        "1",
        "1",
    ]
    assert "http://images.cocodataset.org/zips/train2017.zip" in out
    out, error = grace("data", "prepare", "llava", world / "out", *places, "--skip-missing")
    assert error == ""
    assert out.splitlines()[-1] == f"grace train RECIPE data.train={world}/out/train.jsonl data.root={world}/data"
    document = json.loads(
        grace("data", "prepare", "llava", world / "out", *places, "--skip-missing", "--overwrite", "--json")[0]
    )
    assert document["num_written"] == 1
    assert document["collections"]["coco/train2017"] == {"num_rows": 2, "num_present": 1, "num_missing": 1}


def test_options_of_other_sources_and_unknown_sources(world: Path, grace: Any) -> None:
    assert grace("data", "prepare", "coco", world / "out") == (
        "",
        "unknown source 'coco'; choose one of easy-vqa, scenes, mix, toy, world, text, sharegpt4v, llava, hf, "
        "toy-suite",
    )
    assert grace("data", "prepare", "easy-vqa", world / "out", "--images", world)[1] == (
        "--images is no option of the source easy-vqa; it has --seed"
    )
    assert grace("data", "prepare", "sharegpt4v", world / "out", "--images", world)[1] == (
        "the source sharegpt4v needs --annotations and --images; --annotations not given"
    )
    assert not (world / "out").exists()
