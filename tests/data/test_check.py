"""reliability.md E1: 1,000 rows, 37 faults of the 20 kinds that one picture a row can have, 963 rows untouched."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grace_vlm.data.check import check_file
from grace_vlm.data.rows import KINDS, Row, RowFile
from grace_vlm.errors import DataError

NUM_ROWS = 1_000
UNUSUAL = ("cmyk.jpg", "palette.png", "alpha.png", "sixteen.png", "rotated.jpg", "moving.webp")


def write_pictures(folder: Path) -> None:
    """Four plain pictures, one of each conversion, and the bad ones."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    base = Image.fromarray(noise).resize((48, 36))
    for number in range(4):
        base.rotate(90 * number).save(folder / f"good{number}.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("P").save(folder / "palette.png")
    base.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "rotated.jpg", exif=exif)
    base.save(folder / "moving.webp", save_all=True, append_images=[base.rotate(180)])
    base.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:600])
    (folder / "void.png").touch()
    (folder / "html.jpg").write_bytes(b"<html>404</html>")
    (folder / "folder.png").mkdir()
    header = struct.pack(">IIBBBBB", 8001, 8000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    bomb = b"".join(struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    Image.new("RGB", (7, 30)).save(folder / "small.png")
    Image.new("RGB", (8, 1601)).save(folder / "narrow.png")


def good_row(number: int) -> dict:
    names = [f"good{number % 4}.png", *UNUSUAL]
    record = {
        "id": f"row-{number:04d}",
        "image": f"images/{names[0] if number % 10 else names[1 + number // 10 % 6]}",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"answer {number}"}],
    }
    return record if number % 7 else {**record, "image": None, "conversations": turns(("human", "hi"), ("gpt", "ho"))}


def turns(*pairs: tuple[str, object]) -> list[dict]:
    return [{"from": who, "value": value} for who, value in pairs]


ASKED = ("human", "<image>\nwhat?")
OUTSIDE = "the path is absolute or leaves the root"
BROKEN_IMAGES = [  # file, kind, reason, how many rows show it
    ("images/cut.jpg", "image_truncated", "the JPEG data ends early, after 600 bytes", 3),
    ("images/void.png", "image_empty", "the file has 0 bytes", 2),
    ("images/html.jpg", "image_not_an_image", "the file is none of JPEG, PNG, WEBP, GIF", 2),
    ("images/gone.png", "image_missing", "no such file", 3),
    ("images/folder.png", "image_not_a_file", "the path is a directory", 1),
    ("/etc/hostname", "image_path_outside", OUTSIDE, 1),
    ("../outside.png", "image_path_outside", OUTSIDE, 1),
    ("images/bomb.png", "image_too_large", "8001 x 8000 pixels; at most 64000000 in all are allowed", 2),
    ("images/small.png", "image_too_small", "7 x 30 pixels; each side must be at least 8", 1),
    ("images/narrow.png", "image_too_narrow", "8 x 1601 pixels; one side may be at most 200 times the other", 1),
]
BROKEN_RECORDS = [  # what replaces keys of the good row, kind, reason, how many rows
    ({"image": None}, "image_token_without_image", "1 <image> and no image", 2),
    (
        {"conversations": turns(("human", "<image><image>"), ("gpt", "a"))},
        "too_many_image_tokens",
        "2 <image> for 1 image",
        2,
    ),
    ({"conversations": []}, "no_conversations", "conversations is empty", 1),
    ({"conversations": None}, "no_conversations", "conversations is absent", 1),
    ({"conversations": turns(ASKED, ("bot", "a"))}, "wrong_role", "turn 1 is by 'bot'; 'gpt' is expected", 2),
    ({"conversations": turns(("gpt", "a"), ASKED)}, "answer_first", "turn 0 is by 'gpt'; 'human' is expected", 2),
    ({"conversations": turns(ASKED, ("gpt", ""))}, "empty_answer", "the answer in turn 1 is empty", 2),
    ({"conversations": turns(ASKED, ("gpt", 7))}, "value_not_a_string", "the value of turn 1 is no string", 2),
    (
        {"conversations": turns(ASKED, ("gpt", "x" * 1_000_001))},
        "text_too_long",
        "the value of turn 1 has 1000001 bytes; at most 1000000 are allowed",
        1,
    ),
    ({"id": "row-0001"}, "duplicate_id", "row 1 has the same id", 2),
]


def plant() -> dict[int, tuple[bytes, dict]]:
    """Row -> (its bad line, the ledger line it must give); 37 of them, spread over the file."""
    planted: list[tuple[bytes | dict, str, str]] = []
    for image, kind, reason, count in BROKEN_IMAGES:
        planted += [({"image": image}, kind, f"{image!r}: {reason}")] * count
    for change, kind, reason, count in BROKEN_RECORDS:
        planted += [(change, kind, reason)] * count
    planted += [(b"half", "bad_json", "the JSON breaks at character 28 of 40")] * 2
    planted += [(b"latin", "bad_utf8", "byte 8 of the row is no UTF-8")]
    lines: dict[int, tuple[bytes, dict]] = {}
    for place, (change, kind, reason) in enumerate(planted):
        number = 11 + 26 * place
        record = {**good_row(1), "id": f"row-{number:04d}"}
        line = json.dumps({**record, **change} if isinstance(change, dict) else record).encode()
        row_id = json.loads(line)["id"]
        if change == b"half":
            line, row_id, reason = line[:40], "", reason
        elif change == b"latin":
            line, row_id = line.replace(b"row-", b"\xe9ow-"), ""
        lines[number] = (line, {"row": number, "id": row_id, "kind": kind, "reason": reason})
    return lines


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images")
    path = tmp_path / "clean.jsonl"
    path.write_text("".join(json.dumps(good_row(number)) + "\n" for number in range(NUM_ROWS)))
    return path


def test_a_thousand_rows_with_37_faults_of_20_kinds(clean: Path) -> None:
    planted = plant()
    assert len(planted) == 37
    assert {line["kind"] for _, line in planted.values()} == set(KINDS) - {"too_few_image_tokens"}
    lines = clean.read_bytes().splitlines()
    for number, (line, _) in planted.items():
        lines[number] = line
    path, ledger_path = clean.with_name("bad.jsonl"), clean.with_name("ledger.jsonl")
    path.write_bytes(b"\n".join(lines) + b"\n")
    calls: list[tuple[int, int]] = []
    ledger_path.write_text("left over from another check\n")
    report = check_file(path, ledger_path=ledger_path, progress=lambda *call: calls.append(call))

    expected = [json.dumps(line) for _, line in sorted(planted.values(), key=lambda entry: entry[1]["row"])]
    assert ledger_path.read_text().splitlines() == expected
    assert (report.num_rows, report.num_good, len(report.faults)) == (1_000, 963, 37)
    assert sum(report.counts.values()) == 37
    assert set(report.counts) == set(KINDS) - {"too_few_image_tokens"}
    assert calls == [(number, NUM_ROWS) for number in range(1, NUM_ROWS + 1)]

    before, after = list(RowFile(clean)), list(RowFile(path))
    bad = {fault.row for fault in report.faults}
    kept = [number for number in range(NUM_ROWS) if number not in bad]
    assert [after[number] for number in kept] == [before[number] for number in kept]
    assert all(isinstance(row, Row) for row in before)


def test_conversions_are_counted_by_picture_and_reject_nothing(clean: Path) -> None:
    report = check_file(clean)
    assert (report.num_good, report.faults, report.counts) == (1_000, (), {})
    assert report.num_images == 10
    names = ("alpha", "animation", "cmyk", "exif_rotation", "palette", "sixteen_bit")
    assert report.conversions == dict.fromkeys(names, 1)
    assert sorted(path.name for path in clean.parent.iterdir()) == ["clean.jsonl", "images"]  # no ledger was asked for


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        check_file(tmp_path / "gone.jsonl")
    assert (
        str(caught.value) == f"{tmp_path}/gone.jsonl is no file; a JSON array or JSONL file of LLaVA rows is expected"
    )
