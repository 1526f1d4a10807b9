"""Downloaded rows become rows to train on: counted, with ids of their own, and judged by the ledger alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace_vlm.data.rows import Fault, Row, RowFile
from grace_vlm.data.sources.conversations import PicturesMissing, PreparedRows, prepare_conversations
from grace_vlm.errors import CheckpointError, DataError

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
TEXT = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "words"}]


def row(row_id: Any, image: Any = None, turns: Any = None, **extra: Any) -> dict[str, Any]:
    made = {"id": row_id, "conversations": turns or (TURNS if image else TEXT), **extra}
    return made if image is None else {**made, "image": image}


def write_picture(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / name)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    for name in (
        "coco/train2017/1.jpg",
        "coco/train2017/2.jpg",
        "sam/images/sa_1.jpg",
        "llava/llava_pretrain/images/00453/7.jpg",
    ):
        write_picture(tmp_path / "data", name)
    return tmp_path


def prepare(world: Path, rows: Any, name: str = "out", **options: Any) -> PreparedRows:
    path = world / "rows.json"
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        path.write_text(json.dumps(rows))
    return prepare_conversations("sharegpt4v", world / name, annotations=path, images=world / "data", **options)


def written(world: Path, name: str = "out") -> list[Any]:
    return [json.loads(line) for line in (world / name / "train.jsonl").read_text().splitlines()]


def test_rows_and_pictures_are_counted_by_sub_collection(world: Path) -> None:
    rows = [
        row("a", "coco/train2017/1.jpg"),
        row("b", "coco/train2017/1.jpg"),
        row(
            "c",
            ["coco/train2017/2.jpg", "sam/images/sa_1.jpg"],
            [{"from": "human", "value": "<image><image>?"}, TURNS[1]],
        ),
        row("d", "llava/llava_pretrain/images/00453/7.jpg"),
        row("e"),
    ]
    report = prepare(world, rows).report
    counts = {name: (c.num_rows, c.num_present, c.num_missing) for name, c in report.collections.items()}
    assert counts == {
        "coco/train2017": (3, 2, 0),
        "sam/images": (1, 1, 0),
        "llava/llava_pretrain/images": (1, 1, 0),
    }
    assert (report.num_rows, report.num_written, report.num_text_rows) == (5, 5, 1)
    assert written(world) == rows
    found = list(RowFile(world / "out" / "train.jsonl", world / "data"))
    assert all(isinstance(one, Row) for one in found)
    assert [one.images for one in found if isinstance(one, Row)][2] == ("coco/train2017/2.jpg", "sam/images/sa_1.jpg")
    manifest = json.loads((world / "out" / "manifest.json").read_text())
    assert manifest["annotations_sha256"] == hashlib.sha256((world / "rows.json").read_bytes()).hexdigest()
    assert manifest["rows_sha256"]["train"] == hashlib.sha256((world / "out/train.jsonl").read_bytes()).hexdigest()
    assert "academic use" in (world / "out" / "README.md").read_text()


def test_missing_pictures_end_it_or_are_left_out(world: Path) -> None:
    rows = [
        row("a", "coco/train2017/1.jpg"),
        row("b", "wikiart/images/1.jpg"),
        row("c", "wikiart/images/2.jpg"),
        row("d", "coco/train2017/9.jpg"),
        row("e", ["coco/train2017/1.jpg", "wikiart/images/1.jpg"], [{"from": "human", "value": "?"}, TURNS[1]]),
    ]
    with pytest.raises(PicturesMissing) as caught:
        prepare(world, rows)
    assert str(caught.value) == (
        f"3 of 4 pictures are missing below {world}/data, most in wikiart/images: 2 of 2; "
        "download them, or pass --skip-missing to leave out 4 rows"
    )
    assert not (world / "out").exists()
    report = prepare(world, rows, skip_missing=True).report
    assert (report.num_written, report.num_left_out) == (1, 4)
    assert [one["id"] for one in written(world)] == ["a"]
    with pytest.raises(DataError, match="all 1 row need pictures that are missing"):
        prepare(world, rows[1:2], "other", skip_missing=True)


def test_every_row_gets_an_id_of_its_own(world: Path) -> None:
    rows = [row("x"), row("x"), row("x-2"), row("x"), row(7), row("7"), row(""), {"conversations": TEXT}, row(None)]
    report = prepare(world, rows).report
    ids = [one["id"] for one in written(world)]
    assert ids == ["x", "x-3", "x-2", "x-4", "7", "7-2", "6", "7-3", "8"]
    assert len(set(ids)) == len(ids)
    assert (report.num_renamed_ids, report.num_numbered_ids) == (3, 3)
    assert not any(isinstance(found, Fault) for found in RowFile(world / "out" / "train.jsonl"))


def test_other_spellings_become_one(world: Path) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "<image> hi"},
        {"role": "assistant", "content": "ho"},
    ]
    rows = [{"id": "m", "images": ["coco/train2017/1.jpg"], "messages": messages}]
    report = prepare(world, rows).report
    assert report.num_system_turns == 1
    assert written(world) == [
        {
            "id": "m",
            "image": ["coco/train2017/1.jpg"],
            "conversations": [{"from": "human", "value": "<image> hi"}, {"from": "gpt", "value": "ho"}],
        }
    ]


def test_what_is_bad_is_left_for_the_ledger(world: Path) -> None:
    lines = [
        json.dumps(row("good")).encode(),
        b'{"id": "half", "conv',
        json.dumps({**row("out"), "image": "../secret.jpg"}).encode(),
        b'{"id": "twice", "id": "twice"}',
        json.dumps(row("also good")).encode(),
    ]
    report = prepare(world, b"\n".join(lines)).report
    assert (report.num_copied, report.num_outside, report.num_written) == (2, 1, 5)
    kinds = [found.kind if isinstance(found, Fault) else found.id for found in RowFile(world / "out" / "train.jsonl")]
    assert kinds == ["good", "bad_json", "image_path_outside", "bad_json", "also good"]


def test_json_and_jsonl_give_the_same_bytes_twice(world: Path) -> None:
    rows = [row(str(number), "coco/train2017/1.jpg") for number in range(50)]
    prepare(world, rows, "one")
    prepare(world, "\n".join(json.dumps(one) for one in rows).encode(), "two")
    prepare(world, rows, "three")
    contents = [(world / name / "train.jsonl").read_bytes() for name in ("one", "two", "three")]
    assert contents[0] == contents[1] == contents[2]
    assert (world / "one/manifest.json").read_bytes() == (world / "three/manifest.json").read_bytes()


def test_an_existing_folder_is_kept_unless_it_is_to_be_replaced(world: Path) -> None:
    prepare(world, [row("a")])
    with pytest.raises(CheckpointError, match="exists"):
        prepare(world, [row("b")])
    assert written(world)[0]["id"] == "a"
    prepare(world, [row("b")], overwrite=True)
    assert written(world)[0]["id"] == "b"


def test_a_link_that_leaves_the_folder_is_no_picture_folder(world: Path) -> None:
    write_picture(world / "elsewhere", "1.jpg")
    (world / "data" / "gqa").mkdir()
    (world / "data" / "gqa" / "images").symlink_to(world / "elsewhere")
    with pytest.raises(DataError) as caught:
        prepare(world, [row("a", "gqa/images/1.jpg")])
    assert str(caught.value) == (
        f"{world}/data/gqa/images is a link that leaves {world}/data, and no picture outside is read; give the folder "
        "that holds both as --images, or mount or move the pictures there"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds no rows; a JSON array or JSONL of LLaVA rows is expected"),
        (b"[1, 2]", "no JSON object among 2 rows; a JSON array or JSONL of LLaVA rows is expected"),
    ],
)
def test_a_file_without_rows_is_an_error(world: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare(world, content)
    assert str(caught.value).endswith(message)
    assert not (world / "out").exists()
