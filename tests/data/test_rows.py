"""The one row format: streamed, strict, every refusal a fault in its own place."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grace_vlm.data.rows import KINDS, Fault, Row, RowFile, Turn, scan_elements
from grace_vlm.errors import DataError


def row(
    row_id: object = "a", *, image: object = None, turns: tuple[tuple[object, object], ...] = (), **extra: object
) -> dict:
    """A row as it stands on disk; without ``turns`` one good question."""
    turns = turns or (("human", "<image>\nwhat is it?" if image else "what is it?"), ("gpt", "a cat"))
    record = {"id": row_id, "conversations": [{"from": who, "value": value} for who, value in turns], **extra}
    return record if image is None else {**record, "image": image}


def write_lines(path: Path, *lines: object) -> RowFile:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return RowFile(path)


def test_a_row(tmp_path: Path) -> None:
    turns = (("human", "what?\n<image>"), ("gpt", "a cat"), ("human", "sure?"), ("gpt", "yes"))
    rows = write_lines(tmp_path / "a.jsonl", row(17, image="x/1.png", turns=turns, kind="pets", form="open", other=[1]))
    assert rows.row(0) == Row(
        index=0,
        id="17",
        images=("x/1.png",),
        turns=(
            Turn("user", "what?\n<image>"),
            Turn("assistant", "a cat"),
            Turn("user", "sure?"),
            Turn("assistant", "yes"),
        ),
        meta={"kind": "pets", "form": "open"},
    )
    with pytest.raises(IndexError):
        rows.row(1)


def test_a_missing_marker_puts_the_picture_first_and_text_needs_none(tmp_path: Path) -> None:
    turns = (("human", "hi"), ("gpt", "ho"))
    rows = write_lines(tmp_path / "a.jsonl", row("a", image="1.png", turns=turns), row("b", turns=turns))
    assert [found.turns[0].text for found in rows] == ["<image>\nhi", "hi"]
    assert [found.images for found in rows] == [("1.png",), ()]


def test_several_pictures_go_where_their_markers_stand_or_all_first(tmp_path: Path) -> None:
    turns = (("human", "left <image> or right <image>?"), ("gpt", "left"), ("human", "and <image>"), ("gpt", "no"))
    plain = (("human", "same?"), ("gpt", "yes"))
    rows = write_lines(
        tmp_path / "a.jsonl",
        row("a", image=["1.png", "sub/2.png", "1.png"], turns=turns),
        row("b", image=["1.png", "2.png"], turns=plain),
        row("c", image=[], turns=plain),
    )
    assert [found.images for found in rows] == [("1.png", "sub/2.png", "1.png"), ("1.png", "2.png"), ()]
    assert [found.turns[0].text for found in rows] == [turns[0][1], "<image>\n<image>\nsame?", "same?"]


H, G = ("human", "q"), ("gpt", "a")
LONG = "y" * 1_000_001
FAULTS = [
    (row("x", turns=(("human", "<image> q"), G)), "image_token_without_image", "1 <image> and no image"),
    (row("x", image="1.png", turns=(("human", "<image><image>"), G)), "too_many_image_tokens", "2 <image> for 1 image"),
    (row("x", image="1.png", turns=(H, ("gpt", "<image>"))), "too_many_image_tokens", "2 <image> for 1 image"),
    ({"id": "x"}, "no_conversations", "conversations is absent"),
    ({"id": "x", "conversations": []}, "no_conversations", "conversations is empty"),
    ({"id": "x", "conversations": "hi"}, "no_conversations", "conversations is no list"),
    ({"id": "x", "conversations": ["hi"]}, "no_conversations", "turn 0 is no object with from and value"),
    (row("x", turns=(("system", "s"), H, G)), "wrong_role", "turn 0 is by 'system'; 'human' is expected"),
    (row("x", turns=(H, H)), "wrong_role", "turn 1 is by 'human'; 'gpt' is expected"),
    (row("x", turns=(H, G, H)), "wrong_role", "turn 2, the last, is by 'human'; 'gpt' is expected"),
    (row("x", turns=(G, H)), "answer_first", "turn 0 is by 'gpt'; 'human' is expected"),
    (row("x", turns=(H, ("gpt", " \n"))), "empty_answer", "the answer in turn 1 is empty"),
    (row("x", turns=(H, ("gpt", 3))), "value_not_a_string", "the value of turn 1 is no string"),
    (
        row("x", turns=(H, ("gpt", LONG))),
        "text_too_long",
        "the value of turn 1 has 1000001 bytes; at most 1000000 are allowed",
    ),
    (row("x", image="/etc/passwd"), "image_path_outside", "'/etc/passwd': the path is absolute or leaves the root"),
    (row("x", image="a/../../b"), "image_path_outside", "'a/../../b': the path is absolute or leaves the root"),
    (row("x", image="..\\b"), "image_path_outside", "'..\\\\b': the path is absolute or leaves the root"),
    (row("x", image="C:\\b"), "image_path_outside", "'C:\\\\b': the path is absolute or leaves the root"),
    (row("x", image=7), "bad_json", "image is no string; a relative path or a list of them is expected"),
    (row("x", image=["1.png", 7]), "bad_json", "image is no string; a relative path or a list of them is expected"),
    (row("x", image=["1.png", "/b"]), "image_path_outside", "'/b': the path is absolute or leaves the root"),
    (
        row("x", image=["1.png", "2.png"], turns=(("human", "<image>"), G)),
        "too_few_image_tokens",
        "1 <image> for 2 images",
    ),
    (
        row("x", image=["1.png"], turns=(("human", "<image><image>"), G)),
        "too_many_image_tokens",
        "2 <image> for 1 image",
    ),
    (row("x", image=[], turns=(("human", "<image>"), G)), "image_token_without_image", "1 <image> and no image"),
    (
        row("x", image=["1.png", "2.png"], turns=(("human", "<image>"), ("gpt", "<image>"))),
        "too_many_image_tokens",
        "2 <image> for 2 images",
    ),
    (row("x", turns=(("human", "\ud800"), G)), "bad_utf8", "the value of turn 0 holds a lone surrogate"),
]
FAULTS_WITHOUT_ID = [
    (b'{"id": "x", "conv', "bad_json", "the JSON breaks at character 12 of 17"),
    (b'{"id": "x"} {"id": "y"}', "bad_json", "the JSON breaks at character 12 of 23"),
    (b'{"id": "x", "id": "y"}', "bad_json", "a key occurs twice in one object"),
    (b'{"id": "x", "score": NaN}', "bad_json", "NaN is no JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", "bad_json", "a number has too many digits"),
    (b'{"id": ' + b"[" * 100_000, "bad_json", "the JSON is nested too deeply"),
    (b"17", "bad_json", "the row is no JSON object"),
    (row(True), "bad_json", "id is no string and no whole number"),
    ({"conversations": []}, "bad_json", "the row has no id"),
    (b'{"id": "caf\xe9"}', "bad_utf8", "byte 11 of the row is no UTF-8"),
    (row("\udcff"), "bad_utf8", "id holds a lone surrogate"),
    (b'"' + b"z" * 16_000_000, "text_too_long", "the row has 16000001 bytes; at most 16000000 are allowed"),
]


@pytest.mark.parametrize(
    ("content", "row_id", "kind", "reason"),
    [(content, "x", kind, reason) for content, kind, reason in FAULTS]
    + [(content, "", kind, reason) for content, kind, reason in FAULTS_WITHOUT_ID],
    ids=[f"{kind}-{number}" for number, (_, kind, _) in enumerate(FAULTS + FAULTS_WITHOUT_ID)],
)
def test_a_fault_stands_in_its_own_place(tmp_path: Path, content: object, row_id: str, kind: str, reason: str) -> None:
    rows = write_lines(tmp_path / "a.jsonl", row("before"), content, row("after"))
    before, found, after = rows
    assert found == Fault(1, row_id, kind, reason) == rows.row(1)
    assert (before.id, after.id, after.index) == ("before", "after", 2)


def test_there_are_twenty_one_kinds() -> None:
    assert len(KINDS) == 21


def test_the_later_of_duplicate_ids(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "a.jsonl", row("a"), row("7"), row("a"), row(7), row("a"))
    faults = {2: 0, 3: 1, 4: 0}
    for index, first in faults.items():
        row_id = ("a", "7")[first]
        assert rows.row(index) == Fault(index, row_id, "duplicate_id", f"row {first} has the same id")
    assert [isinstance(found, Row) for found in rows] == [True, True, False, False, False]


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    Image.new("RGBA", (9, 9)).save(tmp_path / "root" / "in.png")
    os.symlink(tmp_path / "outside.png", tmp_path / "root" / "link.png")
    os.symlink("loop.png", tmp_path / "root" / "loop.png")
    names = ["in.png", "x/../in.png", "link.png", "loop.png", "nul\0.png", "gone.png"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row(name, image=name) for name in names]))
    rows = RowFile(path, root=tmp_path / "root")
    loaded = [rows.load_image(found, found.images[0]) for found in rows]
    assert [image.conversions for image in loaded[:2]] == [("alpha",)] * 2
    assert loaded[2:] == [
        Fault(2, "link.png", "image_path_outside", "'link.png': a link leaves the root"),
        Fault(3, "loop.png", "image_missing", "'loop.png': no such file"),
        Fault(4, "nul\0.png", "image_missing", "'nul\\x00.png': no such file"),
        Fault(5, "gone.png", "image_missing", "'gone.png': no such file"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{} holds no rows; a JSON array or JSONL file of LLaVA rows is expected"),
        (b"\n \n", "{} holds no rows; a JSON array or JSONL file of LLaVA rows is expected"),
        (b" [ \n ] ", "{} holds no rows; a JSON array or JSONL file of LLaVA rows is expected"),
        (b"[1, 2", "{} ends inside its array, after 1 whole rows; fetch or write the file again"),
        (b'["a\\"]', "{} ends inside its array, after 0 whole rows; fetch or write the file again"),
        (b"[1, 2] 3", "{} is not one JSON array of rows: something else stands after row 1"),
        (b"[1][2]", "{} is not one JSON array of rows: something else stands after row 0"),
        (b"[1, 2}", "{} is not one JSON array of rows: something else stands after row 0"),
    ],
)
def test_a_file_without_structure_is_refused_whole(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        RowFile(path)
    assert str(caught.value) == message.format(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        RowFile(tmp_path)
    assert str(caught.value) == f"{tmp_path} is no file; a JSON array or JSONL file of LLaVA rows is expected"
    write_lines(tmp_path / "a.jsonl", row())
    with pytest.raises(DataError) as caught:
        RowFile(tmp_path / "a.jsonl", root=tmp_path / "no")
    assert (
        str(caught.value) == f"{tmp_path / 'no'} is no folder; the folder that image paths are relative to is expected"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    elements=st.lists(JSON, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    escapes=st.booleans(),
    chunk_bytes=st.sampled_from([1, 2, 3, 7, 1 << 20]),
    bom=st.booleans(),
)
def test_the_scanner_finds_what_json_finds(
    tmp_path_factory: pytest.TempPathFactory,
    elements: list[object],
    indent: int | None,
    escapes: bool,
    chunk_bytes: int,
    bom: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "scan.json"
    data = b"\xef\xbb\xbf" * bom + b" \n" + json.dumps(elements, indent=indent, ensure_ascii=escapes).encode() + b"\n"
    path.write_bytes(data)
    spans = list(scan_elements(path, chunk_bytes))
    assert [json.loads(data[offset : offset + length]) for offset, length in spans] == elements
    lines = [
        json.dumps(element, ensure_ascii=escapes).encode() for element in elements if not isinstance(element, list)
    ]
    data = b"\r\n\n".join(lines)
    path.write_bytes(data)
    spans = list(scan_elements(path, chunk_bytes))
    assert [data[offset : offset + length].strip() for offset, length in spans] == lines


@settings(max_examples=300, deadline=None)
@given(noise=st.text('[]{},"\\ a\n', max_size=30), chunk_bytes=st.sampled_from([1, 2, 1 << 20]))
def test_the_scanner_survives_and_chunks_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, noise: str, chunk_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.json"
    path.write_text("[" + noise)

    def scan(num_bytes: int) -> list[tuple[int, int]] | str:
        try:
            return list(scan_elements(path, num_bytes))
        except DataError as error:
            return str(error)

    assert scan(chunk_bytes) == scan(1 << 16)
    try:
        expected = json.loads("[" + noise)
    except ValueError:
        return
    assert len(scan(chunk_bytes)) == len(expected)


def test_array_and_lines_are_the_same_rows(tmp_path: Path) -> None:
    records = [row(f"r{number}", image='ü[],{}"\\.png', kind="k") for number in range(50)]
    lines = write_lines(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    whole = RowFile(tmp_path / "a.json")
    assert list(whole) == list(lines)
    assert [whole.row(index) for index in (49, 0, 7)] == [list(lines)[index] for index in (49, 0, 7)]
    assert list(pickle.loads(pickle.dumps(whole))) == list(whole)


def test_a_large_array_is_read_in_small_memory(tmp_path: Path) -> None:
    path, num_rows = tmp_path / "large.json", 4_000
    with path.open("w") as file:
        for number in range(num_rows):
            file.write(
                ("[" if number == 0 else ",\n") + json.dumps(row(f"{number:07d}", turns=(H, ("gpt", "z" * 13_000))))
            )
        file.write("]")
    assert path.stat().st_size > 50_000_000
    tracemalloc.start()
    rows = RowFile(path)
    num_good = sum(isinstance(found, Row) for found in rows)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_good == len(rows) == num_rows
    assert peak_bytes < 8_000_000
