"""Every file has the real benchmark's columns, types and quirks, and the counts of the plan."""

from __future__ import annotations

import ast
import base64
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import toy_rows

from grace_vlm.media.image import decode_image

TEXT, IMAGE = pyarrow.string(), pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
HALLUSION = dict.fromkeys(
    ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer",
     "gt_answer_details"), TEXT,
) | {"image": IMAGE}  # fmt: skip
AI2D = {"question": TEXT, "options": pyarrow.list_(TEXT), "answer": TEXT, "image": IMAGE}
MMMU = (
    dict.fromkeys(("id", "question", "options", "explanation"), TEXT)
    | {f"image_{number}": IMAGE for number in range(1, 8)}
    | dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), TEXT)
)
META = pyarrow.struct([("source", TEXT), ("split", TEXT), ("image_path", TEXT)])
MMSTAR = {"index": pyarrow.int64(), "question": TEXT, "image": IMAGE, "answer": TEXT, "category": TEXT,
          "l2_category": TEXT, "meta_info": META}  # fmt: skip
PROBLEM = ["question", "choices", "answer", "hint", "image", "grade", "subject", "topic", "category", "lecture",
           "solution"]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "num_files", "num_rows", "columns"),
    [
        ("hallusion/image-00000-of-00001.parquet", 1, 216, HALLUSION),
        ("hallusion/non_image-00000-of-00001.parquet", 1, 24, HALLUSION),
        ("ai2d/masked/test-00000-of-00001.parquet", 1, 120, AI2D),
        ("ai2d/no_mask/test-00000-of-00001.parquet", 1, 120, AI2D),
        ("mmmu/*/validation-00000-of-00001.parquet", 30, 90, MMMU),
        ("mmstar/mmstar.parquet", 1, 108, MMSTAR),
    ],
)
def test_parquet_columns_types_and_rows(
    suite: Path, pattern: str, num_files: int, num_rows: int, columns: dict[str, pyarrow.DataType]
) -> None:
    files = sorted(suite.glob(pattern))
    assert len(files) == num_files
    tables = [pyarrow.parquet.read_table(file) for file in files]
    for table in tables:
        assert {field.name: field.type for field in table.schema} == columns
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert list(features) == list(columns)
        assert [name for name, one in features.items() if one == {"_type": "Image"}] == [
            name for name, kind in columns.items() if kind == IMAGE
        ]
    assert sum(table.num_rows for table in tables) == num_rows


def test_no_file_is_there_that_no_test_knows(suite: Path) -> None:
    names = [path.relative_to(suite).as_posix() for path in suite.rglob("*") if path.is_file()]
    names = [re.sub(r"^mmmu/[A-Za-z_]+/", "mmmu/S/", name) for name in names]
    found = Counter(re.sub(r"\d+(?=/image.png$)|\d+_\d+$", "N", name) for name in names)
    num_seed_pictures = found.pop("seed/SEED-Bench-image/N")
    assert 170 < num_seed_pictures <= 180
    assert found == {
        "README.md": 1, "manifest.json": 1,
        "hallusion/image-00000-of-00001.parquet": 1, "hallusion/non_image-00000-of-00001.parquet": 1,
        "mmbench/mmbench_dev_en_toy.tsv": 1,
        "scienceqa/problems.json": 1, "scienceqa/pid_splits.json": 1, "scienceqa/images/test/N/image.png": 70,
        "scienceqa/images/train/N/image.png": 6, "scienceqa/images/val/N/image.png": 4,
        "ai2d/masked/test-00000-of-00001.parquet": 1, "ai2d/no_mask/test-00000-of-00001.parquet": 1,
        "mmmu/S/validation-00000-of-00001.parquet": 30,
        "seed/SEED-Bench.json": 1,
        "mmstar/mmstar.parquet": 1, "mmstar/MMStar.tsv": 1,
    }  # fmt: skip


# --- HallusionBench ---


def test_hallusion_groups(suite: Path) -> None:
    rows = toy_rows.hallusion(suite)
    figures, questions = defaultdict(list), defaultdict(list)
    for row in rows:
        key = (row["category"], row["subcategory"], row["set_id"])
        figures[(*key, row["figure_id"])].append(row)
        questions[(*key, row["question_id"])].append(row)
        assert row["gt_answer"] in ("0", "1")
        assert row["gt_answer_details"].startswith({"1": "yes: ", "0": "no: "}[row["gt_answer"]])
    assert (len(figures), len(questions)) == (80, 108)
    for (category, *_, figure), members in figures.items():
        original = {"VS": "1", "VD": "0"}[category]
        is_text = (category, figure) == ("VS", "0")
        assert {row["visual_input"] for row in members} == {"0" if is_text else "1" if figure == original else "2"}
        assert len({row["image"] and row["image"]["bytes"] for row in members}) == 1
        assert all((row["image"] is None) == is_text for row in members)
        assert sorted(row["question_id"] for row in members) == ["0", "1", "2"]
    for (category, *_), members in questions.items():
        assert sorted(row["figure_id"] for row in members) == (["0", "1", "2"] if category == "VS" else ["0", "1"])
        assert len({row["question"] for row in members}) == 1


def test_hallusion_set_ids_alone_do_not_group(suite: Path) -> None:
    rows = toy_rows.hallusion(suite)
    places = defaultdict(set)
    for row in rows:
        places[row["set_id"]].add((row["category"], row["subcategory"]))
    assert len(places["0"]) == 6
    assert {(row["category"], row["subcategory"]) for row in rows} == places["0"]


def test_an_edit_turns_an_answer_in_every_set(suite: Path) -> None:
    golds = defaultdict(dict)
    for row in toy_rows.hallusion(suite):
        if row["visual_input"] != "0":
            key = (row["category"], row["subcategory"], row["set_id"])
            golds[key].setdefault(row["question_id"], []).append(row["gt_answer"])
    assert len(golds) == 36
    for pairs in golds.values():
        turned = sum(first != second for first, second in pairs.values())
        assert 1 <= turned <= 2
    share = sum(row["gt_answer"] == "1" for row in toy_rows.hallusion(suite)) / 240
    assert 0.4 < share < 0.6


# --- MMBench ---


def test_mmbench_table(suite: Path) -> None:
    table = toy_rows.tsv(suite / "mmbench" / "mmbench_dev_en_toy.tsv")
    assert list(table.columns) == ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category",
                                   "source", "split", "image"]  # fmt: skip
    assert len(table) == 370
    assert table["index"].dtype == "int64"
    assert table["index"].is_unique
    assert table["hint"].isna().any()
    assert table["hint"].dropna().str.contains("\n").any()
    assert (
        not table[["question", "A", "B", "answer", "category", "l2-category", "source", "split", "image"]]
        .isna()
        .any()
        .any()
    )
    assert Counter(table[["C", "D"]].notna().sum(axis=1)) == {0: 10, 1: 60, 2: 300}
    assert not (table["C"].isna() & table["D"].notna()).any()


def test_mmbench_rotations_are_rotations(suite: Path) -> None:
    questions = defaultdict(dict)
    for row in toy_rows.tsv(suite / "mmbench" / "mmbench_dev_en_toy.tsv").to_dict("records"):
        turn, index = divmod(row["index"], 1_000_000)
        questions[index][turn] = row
    assert sorted(questions) == list(range(100))
    for turns in questions.values():
        first = turns[0]
        options = [first[letter] for letter in "ABCD" if not pandas.isna(first[letter])]
        assert len(set(options)) == len(options)
        assert sorted(turns) == list(range(len(options)))
        for turn, row in turns.items():
            shown = [row[letter] for letter in "ABCD" if not pandas.isna(row[letter])]
            assert shown == options[turn:] + options[:turn]
            assert row[row["answer"]] == first[first["answer"]]
            same = ("question", "category", "l2-category", "image")
            assert [row[name] for name in same] == [first[name] for name in same]


# --- ScienceQA ---


def test_scienceqa_problems(suite: Path) -> None:
    folder = suite / "scienceqa"
    problems, splits = (json.loads((folder / name).read_text()) for name in ("problems.json", "pid_splits.json"))
    assert {name: len(pids) for name, pids in splits.items()} == {"train": 6, "val": 4, "trainval": 10, "test": 150}
    assert sorted(splits["trainval"] + splits["test"]) == sorted(problems)
    assert splits["trainval"] == splits["train"] + splits["val"]
    split_of = {pid: name for name in ("train", "val", "test") for pid in splits[name]}
    for pid, problem in problems.items():
        assert list(problem) == PROBLEM
        assert type(problem["answer"]) is int
        assert 2 <= len(set(problem["choices"])) == len(problem["choices"]) <= 5
        assert problem["choices"][problem["answer"]] in problem["solution"]
        assert (folder / "images" / split_of[pid] / pid / "image.png").is_file() == (problem["image"] == "image.png")
        assert problem["image"] is not None or problem["hint"]
    test = [problems[pid] for pid in splits["test"]]
    assert sum(problem["image"] is not None for problem in test) == 70
    assert {len(problem["choices"]) for problem in test} == {2, 3, 4, 5}
    assert any(problem["hint"] and problem["image"] for problem in test)
    assert len({problem["subject"] for problem in test}) == 3


# --- AI2D ---


def test_ai2d_masked_and_unmasked_rows_ask_the_same(suite: Path) -> None:
    masked, unmasked = (
        toy_rows.parquet(suite / "ai2d" / name / "test-00000-of-00001.parquet") for name in ("masked", "no_mask")
    )
    num_labels = 0
    for one, other in zip(masked, unmasked, strict=True):
        assert (one["question"], one["answer"]) == (other["question"], other["answer"])
        assert one["answer"] in ("0", "1", "2", "3")
        assert len(set(one["options"])) == len(set(other["options"])) == 4
        assert one["image"]["bytes"] != other["image"]["bytes"]
        is_label = "label" in one["question"]
        num_labels += is_label
        assert (sorted(one["options"]) == list("ABCD")) == is_label
        assert (one["options"] == other["options"]) != is_label
    assert num_labels == 60
    assert set(Counter(row["answer"] for row in masked)) == set("0123")


# --- MMMU ---


def test_mmmu_rows(suite: Path) -> None:
    folders = sorted(path.name for path in (suite / "mmmu").iterdir())
    assert len(folders) == 30
    assert {"Accounting", "Basic_Medical_Science", "Sociology"} <= set(folders)
    rows = toy_rows.mmmu(suite)
    assert len({row["id"] for row in rows}) == 90
    for row in rows:
        found = re.fullmatch(r"validation_([A-Za-z_]+)_([123])", row["id"])
        assert found[1] in folders
        options = ast.literal_eval(row["options"])
        assert isinstance(options, list)
        assert (row["question_type"], bool(options)) in (("open", False), ("multiple-choice", True))
        named = [int(number) for number in re.findall(r"<image (\d)>", row["question"] + row["options"])]
        assert sorted(set(named)) == [number for number in range(1, 8) if row[f"image_{number}"]]
        assert "Charts" in ast.literal_eval(row["img_type"])[0]
        if options:
            assert "ABCDEFGH".index(row["answer"]) < len(options) == len(set(options))
    assert {len(ast.literal_eval(row["options"])) for row in rows} == {0, 2, 3, 4, 5, 6}
    assert sum(row["question_type"] == "open" for row in rows) == 15
    in_options = [row for row in rows if "<image" in row["options"]]
    assert len(in_options) == 15
    assert {("<image" in row["question"]) for row in in_options} == {True, False}
    assert sum(bool(row["image_5"]) for row in rows) >= 5


# --- SEED-Bench ---


def test_seed_questions(suite: Path) -> None:
    folder = suite / "seed"
    document = json.loads((folder / "SEED-Bench.json").read_text())
    assert sorted(document["question_type"].values()) == list(range(1, 13))
    rows = document["questions"]
    assert len({row["question_id"] for row in rows}) == len(rows) == 192
    keys = {"answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type", "question", "question_id",
            "question_type_id"}  # fmt: skip
    for row in rows:
        assert set(row) == keys
        assert row["answer"] in ("A", "B", "C", "D")
        assert len({row[f"choice_{letter}"] for letter in "abcd"}) == 4
        assert (row["data_type"] == "video") == (row["question_type_id"] >= 10)
        assert (folder / "SEED-Bench-image" / row["data_id"]).is_file() == (row["data_type"] == "image")
    types = Counter(row["question_type_id"] for row in rows)
    assert types == {**dict.fromkeys(range(1, 10), 20), **dict.fromkeys((10, 11, 12), 4)}


def test_seeds_pictures_of_easy_vqa_are_of_its_test_part(suite: Path) -> None:
    import easy_vqa

    test = {Path(path).read_bytes() for path in easy_vqa.get_test_image_paths().values()}
    asked = {
        (question, number): answer for question, answer, number in zip(*easy_vqa.get_test_questions(), strict=True)
    }
    numbers = {Path(path).read_bytes(): number for number, path in easy_vqa.get_test_image_paths().items()}
    rows = json.loads((suite / "seed" / "SEED-Bench.json").read_text())["questions"]
    rows = [row for row in rows if row["question_type_id"] in (2, 3)]
    assert len(rows) == 40
    for row in rows:
        png = (suite / "seed" / "SEED-Bench-image" / row["data_id"]).read_bytes()
        assert png in test
        assert asked[row["question"], numbers[png]] == row[f"choice_{row['answer'].lower()}"]


# --- MMStar ---


def test_mmstar_twice(suite: Path) -> None:
    rows = toy_rows.parquet(suite / "mmstar" / "mmstar.parquet")
    table = toy_rows.tsv(suite / "mmstar" / "MMStar.tsv")
    assert list(table.columns) == ["index", "question", "image", "answer", "category", "l2_category", "meta_info", "A",
                                   "B", "C", "D"]  # fmt: skip
    assert not table.isna().any().any()
    for row, other in zip(rows, table.to_dict("records"), strict=True):
        question, _, options = row["question"].partition("\nOptions: ")
        assert question == other["question"]
        assert options == ", ".join(f"{letter}: {other[letter]}" for letter in "ABCD")
        assert row["image"]["bytes"] == base64.b64decode(other["image"])
        assert ast.literal_eval(other["meta_info"]) == row["meta_info"]
        assert [row[name] for name in ("index", "answer", "category", "l2_category")] == [
            other[name] for name in ("index", "answer", "category", "l2_category")
        ]
    assert Counter(Counter(row["category"] for row in rows).values()) == {18: 6}
    assert Counter(Counter((row["category"], row["l2_category"]) for row in rows).values()) == {6: 18}
    assert sum("<image 1>" in row["question"] for row in rows) == 18
    assert {row["answer"] for row in rows} == set("ABCD")


# --- pictures ---


def test_every_picture_decodes_and_none_is_blank(suite: Path) -> None:
    pngs = {png for _, png, _ in toy_rows.asked(suite)}
    pngs |= {row[f"image_{n}"]["bytes"] for row in toy_rows.mmmu(suite) for n in range(1, 8) if row[f"image_{n}"]}
    assert len(pngs) > 850
    for png in pngs:
        image = decode_image(png).image
        colors = sorted((count for count, _ in image.getcolors(maxcolors=1 << 16)), reverse=True)
        assert len(colors) >= 2
        assert sum(colors[1:]) >= 0.005 * image.width * image.height, "less than 0.5 % of it is drawn on"
        assert image.size in ((64, 64), (128, 128), (192, 192))
