"""Small benchmarks in the true layouts, with every column and type of the real files (shared/evaluation.md 1).

Each function writes into a folder and returns it. ``rename`` gives one column another name, in every file.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Rename = tuple[str, str] | None
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def cell(colour: str | None) -> dict[str, Any] | None:
    """A picture as Hugging Face stores it."""
    return None if colour is None else {"bytes": png(colour), "path": None}


def write_parquet(file: Path, rows: Sequence[dict[str, Any]], types: dict[str, Any], rename: Rename = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    names = [rename[1] if rename and name == rename[0] else name for name in arrays]
    pq.write_table(pa.Table.from_arrays(list(arrays.values()), names=names), file, row_group_size=2)


def write_tsv(file: Path, names: Sequence[str], rows: Sequence[Sequence[Any]], rename: Rename = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = [rename[1] if rename and name == rename[0] else name for name in names]
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter="\t").writerows([shown, *rows])


def renamed(row: dict[str, Any], rename: Rename) -> dict[str, Any]:
    return {rename[1] if rename and key == rename[0] else key: value for key, value in row.items()}


HALLUSION_ROWS = (
    # category, subcategory, visual_input, set, figure, question, gold
    ("VD", "figure", "1", "0", "0", "0", "1"),
    ("VD", "figure", "1", "0", "0", "1", "0"),
    ("VD", "figure", "1", "0", "1", "0", "0"),
    ("VD", "figure", "1", "0", "1", "1", "1"),
    ("VS", "chart", "1", "0", "1", "0", "1"),
    ("VS", "chart", "2", "0", "2", "0", "0"),
)
HALLUSION_TEXT_ROWS = (("VS", "chart", "0", "0", "0", "0", "1"),)


def hallusion(folder: Path, rename: Rename = None) -> Path:
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer")
    types = dict.fromkeys((*names, "sample_note", "question", "gt_answer_details", "filename"), pa.string())

    def rows(given: Sequence[Sequence[str]], colour: str | None) -> list[dict[str, Any]]:
        return [
            dict(zip(names, row, strict=True))
            | {"question": f"Is figure {number} red?", "gt_answer_details": "It is.", "filename": None}
            | {"image": cell(colour), "sample_note": "note"}
            for number, row in enumerate(given)
        ]

    types |= {"image": PICTURE}
    write_parquet(folder / "data" / "image-00000-of-00001.parquet", rows(HALLUSION_ROWS, "red"), types, rename)
    text = rows(HALLUSION_TEXT_ROWS, None)
    write_parquet(folder / "data" / "non_image-00000-of-00001.parquet", text, types, rename)
    return folder


MMBENCH_NAMES = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "source", "split", "image"),
)


def mmbench(folder: Path, rename: Rename = None) -> Path:
    """Question 1: four options in two rotations; question 2: two options, ``nan`` and empty cells, a hint with a line
    break; its rotation only names the row that has the picture."""
    red, blue = (base64.b64encode(png(colour)).decode() for colour in ("red", "blue"))
    of_1, of_2 = ("logic", "reasoning", "src", "dev"), ("colour", "perception", "src", "dev")
    rows = [
        [1, "What is it?", "", "cat", "None", "5 &lt; 6", "dog", "B", *of_1, red],
        [2, "Is it blue?", "Look\nat it", "yes", "no", "nan", "", "A", *of_2, blue],
        [1_000_001, "What is it?", "nan", "dog", "cat", "None", "5 &lt; 6", "C", *of_1, red],
        [1_000_002, "Is it blue?", "Look\nat it", "no", "yes", "", "", "B", *of_2, "2"],
    ]
    write_tsv(folder / "mmbench_dev_en_20231003.tsv", MMBENCH_NAMES, rows, rename)
    return folder


def scienceqa(folder: Path, rename: Rename = None) -> Path:
    """Three of the test split, with 2, 3 and 5 options, one with a picture; one of the training split."""

    def problem(**given: Any) -> dict[str, Any]:
        own = {"question": "Which?", "choices": ["an owl", "a bat"], "answer": 1, "hint": "", "image": None}
        own |= {"task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "biology"}
        own |= {"category": "Animals", "skill": "s", "lecture": "", "solution": "", "split": "test"}
        return renamed(own | given, rename)

    problems = {
        "7": problem(image="image.png", hint="Look &amp; see. "),
        "8": problem(choices=["x", "y", "z"], answer=0, subject="social science"),
        "9": problem(choices=["1", "2", "3", "4", "5"], answer=4, grade="grade10"),
        "10": problem(split="train"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["10"], "val": [], "test": ["7", "8", "9"]}))
    (folder / "images" / "test" / "7").mkdir(parents=True)
    (folder / "images" / "test" / "7" / "image.png").write_bytes(png("green"))
    return folder


def ai2d(folder: Path, rename: Rename = None) -> Path:
    """Three questions on two diagrams, the answer a place as text."""
    rows = [
        {"question": "What eats B?", "options": ["A", "C", "E", "F"], "answer": "2", "image": cell("red")},
        {"question": "What is A?", "options": ["leaf", "root", "stem", "soil"], "answer": "0", "image": cell("red")},
        {"question": "What is it?", "options": ["sun", "moon", "star", "sky"], "answer": "3", "image": cell("blue")},
    ]
    types = {"question": pa.string(), "options": pa.list_(pa.string()), "answer": pa.string(), "image": PICTURE}
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, types, rename)
    return folder


MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))


def mmmu(folder: Path, rename: Rename = None) -> Path:
    """Two subjects: two pictures in a question, options that are pictures, open number, text and list."""
    own = {"img_type": "['Plots']", "topic_difficulty": "Easy", "subfield": "f", "explanation": ""}

    def row(**given: Any) -> dict[str, Any]:
        return {"question_type": "multiple-choice", "options": "[]", **own, **given}

    art = [
        row(
            id="validation_Art_1",
            question="Which is older, <image 1> or <image 2>?",
            options="['the first', '<image 1> &amp; it', \"the second's\"]",
            answer="C",
            image_1=cell("red"),
            image_2=cell("blue"),
        ),
        row(
            id="validation_Art_2",
            question="Which fits <image 1>?",
            options="['<image 2>', '<image 3>']",
            answer="B",
            image_1=cell("red"),
            image_2=cell("blue"),
            image_3=cell("green"),
        ),
    ]
    maths = [
        row(id="validation_Math_1", question_type="open", question="<image 1> Sum?", answer="10", image_1=cell("red")),
        row(
            id="validation_Math_2",
            question_type="open",
            question="Voltage in <image 1>?",
            answer="['8.4', '8.4 V']",
            image_1=cell("red"),
        ),
        row(id="validation_Math_3", question_type="open", question="Name it <image 1>", answer="Bar chart"),
    ]
    maths[2]["image_1"] = cell("blue")
    names = ("id", "question", "options", "answer", "question_type", *own)
    types = dict.fromkeys(names, pa.string()) | dict.fromkeys(MMMU_IMAGES, PICTURE)
    write_parquet(folder / "Art" / "validation-00000-of-00001.parquet", art, types, rename)
    write_parquet(folder / "Math" / "validation-00000-of-00001.parquet", maths, types, rename)
    write_parquet(folder / "Math" / "dev-00000-of-00001.parquet", maths, types, rename)
    return folder


def seed(folder: Path, rename: Rename = None) -> Path:
    """Three questions on two pictures, one file of which lacks its ending in ``data_id``, and two videos."""

    def question(number: int, **given: Any) -> dict[str, Any]:
        own = {"choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four", "answer": "B"}
        own |= {"data_id": "1_2.jpg", "data_type": "image", "question_id": str(number), "question_type_id": 1}
        return renamed(own | {"question": f"How many {number}?", "segment": [0, 1]} | given, rename)

    questions = [
        question(1),
        question(2, data_type="video", data_id="v.webm", question_type_id=10),
        question(3, answer="D", question_type_id=5),
        question(4, data_id="77", question_type_id=5, answer="A"),
        question(5, data_type="video", data_id="w.webm", question_type_id=11),
    ]
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10, "Action Prediction": 11}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": types}))
    (folder / "SEED-Bench-image").mkdir()
    (folder / "SEED-Bench-image" / "1_2.jpg").write_bytes(png("red"))
    (folder / "SEED-Bench-image" / "77.png").write_bytes(png("blue"))
    return folder


_MMSTAR = (
    # index, answer, category, l2_category
    (0, "A", "coarse perception", "image scene and topic"),
    (1, "B", "coarse perception", "image emotion"),
    (2, "C", "math", "geometry"),
    (3, "D", "math", "geometry"),
)
_MMSTAR_QUESTION = "<image 1>\nWhich? Options: A: cat, B: dog, C: a green cone, D: sun"


def mmstar(folder: Path, rename: Rename = None) -> Path:
    """The Parquet of Lin-Chen/MMStar: the options are in the question's text."""
    types = {"index": pa.int64(), "question": pa.string(), "image": PICTURE, "answer": pa.string()}
    types |= {"category": pa.string(), "l2_category": pa.string(), "meta_info": pa.string()}
    rows = [
        {"index": i, "answer": a, "category": c, "l2_category": d, "image": cell("red"), "question": _MMSTAR_QUESTION}
        for i, a, c, d in _MMSTAR
    ]
    write_parquet(folder / "mmstar.parquet", rows, types, rename)
    return folder


def mmstar_tsv(folder: Path, rename: Rename = None) -> Path:
    """The TSV of VLMEvalKit: options in columns."""
    names = ("index", "question", "A", "B", "C", "D", "answer", "category", "l2_category", "meta_info", "image")
    image = base64.b64encode(png("red")).decode()
    options = ("cat", "dog", "a green cone", "sun")
    rows = [(i, "Which?", *options, a, c, d, "{}", image) for i, a, c, d in _MMSTAR]
    write_tsv(folder / "MMStar.tsv", names, rows, rename)
    return folder


def _text_columns(*names: str, **others: Any) -> dict[str, Any]:
    return dict.fromkeys(names, pa.string()) | others


def pope(folder: Path, rename: Rename = None) -> Path:
    """Two pictures, two categories; the same question ids in both categories."""
    rows = [
        {"id": str(number), "question_id": str(number % 3), "category": category, "question": "Is there a cat?"}
        | {"answer": answer, "image_source": f"COCO_{name}", "image": cell(name)}
        for number, (category, name, answer) in enumerate(
            (
                *(("random", "red", "yes"), ("random", "blue", "no"), ("random", "blue", "yes")),
                *(("popular", "red", "yes"), ("popular", "red", "no"), ("popular", "blue", "no")),
            )
        )
    ]
    types = _text_columns("id", "question_id", "question", "answer", "image_source", "category", image=PICTURE)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, types, rename)
    return folder


def gqa(folder: Path, rename: Rename = None) -> Path:
    """Three questions on two pictures, in two tables."""
    images = [{"id": "n1", "image": cell("red")}, {"id": "n2", "image": cell("blue")}]
    own = {"fullAnswer": "It is.", "isBalanced": True, "semanticStr": "s"}
    asked = [
        {"id": f"0{number}", "imageId": image, "question": "What is it?", "answer": answer, **own}
        for number, (image, answer) in enumerate([("n2", "traffic light"), ("n1", "yes"), ("n2", "left")])
    ]
    of_images = _text_columns("id", image=PICTURE)
    write_parquet(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images, of_images)
    types = _text_columns("id", "imageId", "question", "answer", "fullAnswer", "semanticStr", isBalanced=pa.bool_())
    write_parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", asked, types, rename)
    return folder


TEN = ("cat",) * 2 + ("a Cat",) + ("dog",) * 3 + ("two", "2", "cat!", "bird")
"""What ten people said: four cats, three dogs, two twos, one bird, once words are alike."""


def vqav2(folder: Path, rename: Rename = None) -> Path:
    answers = [{"answer": said, "answer_confidence": "yes", "answer_id": number} for number, said in enumerate(TEN, 1)]
    kind = pa.struct([("answer", pa.string()), ("answer_confidence", pa.string()), ("answer_id", pa.int64())])
    rows = [
        {
            "question_id": 100 + number,
            "image_id": 9,
            "question": "What Is it?",
            "answers": answers,
            "image": cell("red"),
        }
        | {"answer_type": answer_type, "question_type": "what is", "multiple_choice_answer": "cat"}
        for number, answer_type in enumerate(("other", "number"))
    ]
    types = _text_columns("question", "answer_type", "question_type", "multiple_choice_answer", image=PICTURE)
    types |= {"question_id": pa.int64(), "image_id": pa.int64(), "answers": pa.list_(kind)}
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows, types, rename)
    return folder


def textvqa(folder: Path, rename: Rename = None) -> Path:
    rows = [
        {"question_id": 7, "image_id": "x1", "question": "what Brand is it?", "answers": list(TEN)}
        | {"ocr_tokens": ["Dakota", "DIGITAL"], "image": cell("red"), "set_name": "val", "image_classes": ["Camera"]}
    ]
    texts = pa.list_(pa.string())
    types = _text_columns("image_id", "question", "set_name", question_id=pa.int64(), answers=texts, image=PICTURE)
    types |= {"ocr_tokens": texts, "image_classes": texts}
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows, types, rename)
    return folder


def vizwiz(folder: Path, rename: Rename = None) -> Path:
    rows = [
        {"question_id": f"VizWiz_val_{n}", "question": "Can you tell me?", "answers": list(TEN)}
        | {"image": cell("red"), "category": category}
        for n, category in enumerate(("other", "unanswerable"))
    ]
    types = _text_columns("question_id", "question", "category", answers=pa.list_(pa.string()), image=PICTURE)
    write_parquet(folder / "data" / "val-00000-of-00001.parquet", rows, types, rename)
    return folder


def mme(folder: Path, rename: Rename = None) -> Path:
    """Two pictures in ``count``, one in ``OCR`` and one in ``code_reasoning``, each with two questions."""
    pairs = [("count", "a.png"), ("count", "b.png"), ("OCR", "a.png"), ("code_reasoning", "c.png")]
    rows = [
        {"question_id": name, "category": category, "answer": answer, "image": cell("red")}
        | {"question": "Is it one? Please answer yes or no."}
        for category, name in pairs
        for answer in ("Yes", "No")
    ]
    types = _text_columns("question_id", "question", "answer", "category", image=PICTURE)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, types, rename)
    return folder


WRITERS: dict[str, Callable[..., Path]] = {
    "hallusion": hallusion,
    "mmbench": mmbench,
    "scienceqa": scienceqa,
    "ai2d": ai2d,
    "ai2d_no_mask": ai2d,
    "mmmu": mmmu,
    "seed": seed,
    "mmstar": mmstar_tsv,
    "pope": pope,
    "gqa": gqa,
    "vqav2": vqav2,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "mme": mme,
}
