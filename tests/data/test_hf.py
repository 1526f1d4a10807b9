"""Hugging Face data sets: pictures inside are written undecoded, paths stay paths, rows are LLaVA's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace_vlm.data.rows import Row, RowFile
from grace_vlm.data.sources.hf import prepare_hf
from grace_vlm.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "pictures" / name for name in ("0.jpg", "1.png", "2.jpg")]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        Image.new("RGB", (40 + number, 32), "blue").save(path)
    return paths


def table(pictures: list[Path], embedded: bool = True, **columns: Any) -> Any:
    images = [{"bytes": path.read_bytes(), "path": None} if embedded else str(path) for path in pictures]
    made = {"id": ["a", "b", "a"], "image": images, "conversations": [TURNS] * 3, **columns}
    found = datasets.Dataset.from_dict({name: values for name, values in made.items() if values is not None})
    return found.cast_column("image", datasets.Image()) if embedded else found


def written(out: Path) -> list[Any]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_embedded_pictures_keep_their_bytes(tmp_path: Path, pictures: list[Path], kind: str) -> None:
    source = tmp_path / ("set.parquet" if kind == "parquet" else "saved")
    made = table(pictures)
    made.to_parquet(str(source)) if kind == "parquet" else made.save_to_disk(str(source))
    prepare_hf(tmp_path / "out", dataset=str(source))
    rows = written(tmp_path / "out")
    assert [one["id"] for one in rows] == ["a", "b", "a-2"]
    assert [one["image"] for one in rows] == ["images/00000000.jpg", "images/00000001.png", "images/00000002.jpg"]
    for one, path in zip(rows, pictures, strict=True):
        assert (tmp_path / "out" / one["image"]).read_bytes() == path.read_bytes()
    found = RowFile(tmp_path / "out" / "train.jsonl")
    for one in found:
        assert isinstance(one, Row)
        assert found.load_image(one, one.images[0]).image.size[1] == 32  # type: ignore[union-attr]


def test_several_pictures_and_messages(tmp_path: Path, pictures: list[Path]) -> None:
    images = [[{"bytes": path.read_bytes(), "path": None} for path in pictures[:2]], None]
    messages = [[{"role": "user", "content": "<image><image> same?"}, {"role": "assistant", "content": "no"}],
                [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]  # fmt: skip
    made = datasets.Dataset.from_dict({"images": images, "messages": messages})
    made = made.cast_column("images", datasets.Sequence(datasets.Image()))
    made.to_parquet(str(tmp_path / "set.parquet"))
    prepare_hf(tmp_path / "out", dataset=str(tmp_path / "set.parquet"))
    rows = written(tmp_path / "out")
    assert rows[0]["image"] == ["images/00000000.jpg", "images/00000000-1.png"]
    assert "image" not in rows[1]
    assert rows[0]["conversations"][0] == {"from": "human", "value": "<image><image> same?"}
    assert all(isinstance(one, Row) for one in RowFile(tmp_path / "out" / "train.jsonl"))


def test_paths_stay_paths_below_the_folder(tmp_path: Path, pictures: list[Path]) -> None:
    table(pictures, embedded=False).to_parquet(str(tmp_path / "set.parquet"))
    with pytest.raises(ConfigError, match="give the folder with --images"):
        prepare_hf(tmp_path / "out", dataset=str(tmp_path / "set.parquet"))
    assert not (tmp_path / "out").exists()
    prepare_hf(tmp_path / "out", dataset=str(tmp_path / "set.parquet"), images=tmp_path / "pictures")
    assert [one["image"] for one in written(tmp_path / "out")] == ["0.jpg", "1.png", "2.jpg"]
    assert not (tmp_path / "out" / "images").exists()


def test_what_is_not_there_is_named(tmp_path: Path, pictures: list[Path]) -> None:
    made = table(pictures).rename_column("image", "photo")
    made.to_parquet(str(tmp_path / "set.parquet"))

    def error(**options: Any) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            prepare_hf(tmp_path / "out", **{"dataset": str(tmp_path / "set.parquet"), **options})
        return str(caught.value)

    assert error() == (
        f"{tmp_path}/set.parquet has no column image or images; its columns are id, photo, conversations; "
        "name the right one: --image-column"
    )
    assert error(image_column="foto").startswith(f"{tmp_path}/set.parquet has no column 'foto'; its columns are")
    assert error(dataset=str(tmp_path / "none.parquet")) == (
        f"{tmp_path}/none.parquet does not exist; an id on the Hub, a folder of save_to_disk, a Parquet file or a "
        "folder of data files is expected"
    )
    assert error(skip_missing=True) == ("--skip-missing is for pictures given by path; give their folder with --images")
    prepare_hf(tmp_path / "out", dataset=str(tmp_path / "set.parquet"), image_column="photo")
    assert len(written(tmp_path / "out")) == 3
