"""Cells of strangers' files, lazily read pictures, and errors of one line."""

from __future__ import annotations

import base64
import pickle
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import task_files
from task_files import PICTURE, png, write_parquet, write_tsv

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.columns import Cells, Column, is_empty
from grace_vlm.evals.tasks.readers import find_files, local_source, read_json, read_table
from grace_vlm.evals.tasks.registry import TASKS

HERE = Path("set.tsv")


def cells(value: Any) -> Cells:
    return Cells(HERE, 3, {"x": value})


@pytest.mark.parametrize("value", [None, "", "  ", "nan", "NaN", float("nan")])
def test_empty_cells(value: object) -> None:
    assert is_empty(value)
    assert cells(value).optional_text("x") is None
    assert cells(value).texts("x") == ()


@pytest.mark.parametrize("value", ["None", "NA", "null", "n/a", 0, 0.0, "0"])
def test_answers_that_pandas_would_drop(value: object) -> None:
    assert not is_empty(value)
    assert cells(value).text("x") == str(value).removesuffix(".0")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("['a', \"b's\"]", ("a", "b's")),
        (["a", "b"], ("a", "b")),
        ("('1', 2)", ("1", "2")),
        ([1, 2.5], ("1", "2.5")),
        ("['&lt;b&gt;']", ("&lt;b&gt;",)),
        ("[]", ()),
    ],
)
def test_lists_and_their_texts(value: object, found: tuple[str, ...]) -> None:
    assert cells(value).texts("x") == found


@pytest.mark.parametrize("value", ["a, b", "['a'", "{'a': 1}", "__import__('os')", [["a"]], 3])
def test_what_is_no_list(value: object) -> None:
    with pytest.raises(DataError, match=r"row 3 of set.tsv has .* in the column 'x'; expected a list of texts"):
        cells(value).texts("x")


@pytest.mark.parametrize(("value", "found"), [("3", 3), (3, 3), (3.0, 3), (" -2 ", -2)])
def test_whole_numbers(value: object, found: int) -> None:
    assert cells(value).integer("x") == found


@pytest.mark.parametrize("value", ["3.5", "three", "²", "--2", "1_0", "yes"])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(DataError, match="expected a whole number: correct the file"):
        cells(value).integer("x")


def test_a_long_cell_is_shown_short() -> None:
    with pytest.raises(DataError) as caught:
        cells(["y" * 1000]).text("x")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "value", [{"bytes": png("red"), "path": None}, png("red"), base64.b64encode(png("red")).decode()]
)
def test_pictures_in_all_their_forms(value: object) -> None:
    assert cells(value).raw("x") == png("red")


def test_a_picture_by_path_stays_below_its_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    for value in ("a.png", {"bytes": None, "path": "a.png"}):
        assert Cells(tmp_path / "set" / "x.tsv", 0, {"x": value}).raw("x") == png("red")
    for value in ("../b.png", str(tmp_path / "b.png"), {"bytes": None, "path": "../b.png"}):
        with pytest.raises(DataError, match=r"expected a picture: bytes, \{bytes, path\}, base64 or a path"):
            Cells(tmp_path / "set" / "x.tsv", 0, {"x": value}).raw("x")


COLUMNS = (Column("name"), Column("image", "picture"), Column("second", "picture", optional=True, nullable=True))


def test_parquet_pictures_are_read_when_asked_in_any_order(tmp_path: Path) -> None:
    """Row groups of two rows; a picture that is null is none."""
    colours = ["red", "blue", "green", "black", "white"]
    rows = [
        {"name": name, "image": task_files.cell(name), "second": task_files.cell(name if name > "c" else None)}
        for name in colours
    ]
    file = tmp_path / "a.parquet"
    write_parquet(file, rows, {"name": pa.string(), "image": PICTURE, "second": PICTURE})
    found = list(read_table(file, COLUMNS, "T"))
    assert pq.ParquetFile(file).num_row_groups == 3
    assert [row.text("name") for row, _ in found] == colours
    assert [row.row for row, _ in found] == [0, 1, 2, 3, 4]
    assert ["second" in pictures for _, pictures in found] == [True, False, True, False, True]
    for number in (4, 0, 3, 1, 2, 0):
        assert found[number][1]["image"].load() == png(colours[number])


def test_one_row_group_of_pictures_is_in_memory(tmp_path: Path) -> None:
    """Twenty megabytes in groups of two."""
    size = 1 << 20
    rows = [{"name": "x", "image": {"bytes": bytes([number]) * size, "path": None}} for number in range(20)]
    write_parquet(tmp_path / "a.parquet", rows, {"name": pa.string(), "image": PICTURE})
    del rows
    tracemalloc.start()
    found = list(read_table(tmp_path / "a.parquet", COLUMNS, "T"))
    assert all(pictures["image"].load() == bytes([n]) * size for n, (_, pictures) in enumerate(found))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 * size


def test_pictures_are_right_from_any_thread_and_process(tmp_path: Path) -> None:
    """Two rows a group: threads that ask for others' groups must not get others' pictures."""
    rows = [{"name": "x", "image": {"bytes": b"%d" % number, "path": None}} for number in range(40)]
    write_parquet(tmp_path / "a.parquet", rows, {"name": pa.string(), "image": PICTURE})
    pictures = [found["image"] for _, found in read_table(tmp_path / "a.parquet", COLUMNS, "T")]
    numbers = random.Random(0).choices(range(40), k=400)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: pictures[number].load(), numbers)) == [b"%d" % number for number in numbers]
    write_tsv(tmp_path / "a.tsv", ["name", "image"], [["x", base64.b64encode(png("red")).decode()]])
    pictures += [found["image"] for _, found in read_table(tmp_path / "a.tsv", COLUMNS, "T")]
    pictures += [doc.images[0] for doc in TASKS["seed"].docs(task_files.seed(tmp_path / "seed"))]
    sent = pickle.loads(pickle.dumps(pictures))
    assert [one.load() for one in sent] == [one.load() for one in pictures]


def test_a_tsv_with_a_mark_of_order_quotes_and_long_fields(tmp_path: Path) -> None:
    image = base64.b64encode(png("red") + bytes(200_000)).decode()
    file = tmp_path / "a.tsv"
    write_tsv(file, ["name", "image"], [['he said "a\tb"\nand left', image], ["nan", image]])
    file.write_text("\ufeff" + file.read_text(encoding="utf-8"), encoding="utf-8")
    rows = list(read_table(file, COLUMNS, "T"))
    assert rows[0][0].text("name") == 'he said "a\tb"\nand left'
    assert rows[0][1]["image"].load() == png("red") + bytes(200_000)
    assert rows[1][0].optional_text("name") is None


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content, expected in (
        ("a.parquet", b"PAR1 no", r"a.parquet cannot be read as Parquet: .*; fetch it again"),
        ("a.tsv", b"\xff\xfe", r"a.tsv cannot be read as tab-separated: .*; fetch it again"),
        ("b.tsv", b"", r"b.tsv is empty; a first line with the names of its columns is expected"),
        ("c.tsv", b"name\timage\nx\n", r"row 0 of .*c.tsv has 1 cells; its 2 columns need one each: fetch it again"),
        ("a.txt", b"", r"a.txt is no .parquet and no .tsv file; T is stored in one of these"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=expected) as caught:
            list(read_table(tmp_path / name, COLUMNS, "T"))
        assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a.json cannot be read as JSON: .*; fetch it again"):
        read_json(tmp_path / "a.json")


def test_a_parquet_file_that_goes_away_under_its_pictures(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, [{"name": "red", "image": task_files.cell("red")}], {"name": pa.string(), "image": PICTURE})
    (_, pictures), *_ = read_table(file, COLUMNS, "T")
    file.unlink()
    with pytest.raises(DataError, match=r"a.parquet cannot be read as Parquet"):
        pictures["image"].load()


def test_a_source_that_is_nowhere(tmp_path: Path) -> None:
    about = TASKS["mmmu"].about
    with pytest.raises(DataError) as caught:
        local_source(tmp_path / "nothing", about)
    assert str(caught.value) == (
        f"{tmp_path / 'nothing'} does not exist; a file or folder in the layout of MMMU is expected, "
        "or the id of a data set on the Hub such as MMMU/MMMU"
    )
    with pytest.raises(
        DataError, match=r"has no file \*/validation-\*.parquet or validation-\*.parquet, which MMMU is"
    ):
        TASKS["mmmu"].docs(tmp_path)


def test_a_hub_id_is_fetched_as_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the hub's end is replaced: what it would have fetched is a folder."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetched(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(task_files.mmmu(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert len(TASKS["mmmu"].docs("MMMU/MMMU")) == 5
    patterns = ["*/validation-*.parquet"]
    assert asked == [("MMMU/MMMU", {"repo_type": "dataset", "revision": "main", "allow_patterns": patterns})]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo_id: str, **options: Any) -> str:
        raise OSError("no\nconnection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    expected = "owner/name is no local path and cannot be fetched: no connection; give a local folder"
    with pytest.raises(DataError) as caught:
        local_source("owner/name", TASKS["mmmu"].about)
    assert str(caught.value) == expected


def test_files_that_say_how_many_they_are(tmp_path: Path) -> None:
    """Two of three files of a benchmark are no benchmark."""
    whole = next(task_files.mmmu(tmp_path / "given").glob("*/validation-*.parquet"))
    for number in range(3):
        path = tmp_path / "mmmu" / "Art" / f"validation-{number:05d}-of-00003.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole.read_bytes())
    about = TASKS["mmmu"].about
    assert len(find_files(tmp_path / "mmmu", ("*/validation-*.parquet",), about=about)) == 3
    (tmp_path / "mmmu" / "Art" / "validation-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError) as caught:
        find_files(tmp_path / "mmmu", ("*/validation-*.parquet",), about=about)
    assert str(caught.value) == (
        f"{tmp_path}/mmmu/Art has 2 of the 3 files validation-*-of-00003.parquet; "
        "fetch validation-00001-of-00003.parquet too"
    )
