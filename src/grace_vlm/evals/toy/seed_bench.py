"""SEED-Bench's layout: one JSON of questions, pictures without a suffix beside it, and video rows to be skipped.

    SEED-Bench.json  SEED-Bench-image/<data_id>

Nine types of questions about pictures, 20 each; types 10 to 12 are about videos, which are not here. Types 2 and 3 are
pictures of easy-VQA's test part.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grace_vlm.data.sources import easy_vqa
from grace_vlm.data.sources.questions import Sizes, wrong_answers
from grace_vlm.evals.toy.deck import LETTERS, Deck, Item
from grace_vlm.evals.toy.layout import write_json, write_picture

NAME = "seed"
TYPES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Attributes": 3,
    "Instance Location": 4,
    "Instances Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Understanding": 9,
    "Action Recognition": 10,
    "Action Prediction": 11,
    "Procedure Understanding": 12,
}
PLAN = {
    # type: (room, kind), by turns
    1: (("grids", "contents"), ("charts", "chart_count"), ("diagrams", "contents"), ("charts", "chart_count")),
    4: (("grids", "scene_color_at"), ("grids", "scene_shape_at"), ("grids", "scene_color_at"), ("grids", "position")),
    5: (("grids", "scene_count_shape"), ("grids", "scene_count_both")),
    6: (("grids", "scene_neighbor"), ("grids", "scene_neighbor"), ("grids", "direction")),
    7: (("diagrams", "diagram_color"), ("diagrams", "diagram_in")),
    8: (("charts", "chart_max"), ("charts", "chart_difference"), ("grids", "scene_neighbor")),
    9: (("digits", "digit_at"), ("charts", "chart_value"), ("digits", "digit_max")),
}
EASY_KINDS = {2: "easy_shape", 3: "easy_color"}
NUM_PER_TYPE, NUM_VIDEOS_PER_TYPE = 20, 4
VIDEO_TYPES = (10, 11, 12)


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write all files; returns what is in them."""
    deck = Deck(NAME, seed)
    rows: list[dict[str, Any]] = []
    names: set[str] = set()
    for type_id in range(1, 10):
        items = _easy_items(deck, type_id) if type_id in EASY_KINDS else _drawn_items(deck, type_id)
        for item in items:
            digest = hashlib.sha256(item.png).hexdigest()
            name = f"{int(digest[:6], 16)}_{int(digest[6:14], 16)}"
            names.add(name)
            write_picture(folder / "SEED-Bench-image" / name, item.png)
            rows.append(_row(type_id, "image", name, item.question, item.options, item.letter))
    rows += _video_rows(deck.rng("videos"))
    deck.rng("order").shuffle(rows)
    for number, row in enumerate(rows):
        row["question_id"] = str(100_000 + number)
    write_json(folder / "SEED-Bench.json", {"question_type": TYPES, "questions": rows})
    num_images = sum(row["data_type"] == "image" for row in rows)
    return {"rows": num_images, "pictures": len(names), "skipped": len(rows) - num_images}


def _drawn_items(deck: Deck, type_id: int) -> Iterator[Item]:
    for number in range(NUM_PER_TYPE):
        yield deck.deal(*PLAN[type_id][number % len(PLAN[type_id])], 4)


def _easy_items(deck: Deck, type_id: int) -> list[Item]:
    """easy-VQA's own open questions, each with three wrong options."""
    rng = deck.rng(EASY_KINDS[type_id])
    found: list[Item] = []
    asked = list(easy_vqa.pictures(0, Sizes(0, 0, easy_vqa.DEFAULT_SIZES.num_test_images)))
    for picture in rng.sample(asked, len(asked)):
        questions = [question for question in picture.questions if question.kind == EASY_KINDS[type_id]]
        if questions and len(found) < NUM_PER_TYPE:
            question = rng.choice(questions)
            options = [question.answer, *rng.sample(wrong_answers(question.answer), 3)]
            rng.shuffle(options)
            place = options.index(question.answer)
            found.append(Item(question.kind, question.text, tuple(options), place, picture.png, picture.caption))
    return found


def _video_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    for type_id in VIDEO_TYPES:
        for _ in range(NUM_VIDEOS_PER_TYPE):
            options = tuple(rng.sample(("falling", "growing", "turning", "shrinking", "rising"), 4))
            name = f"{rng.randrange(10**5)}.webm"
            yield _row(type_id, "video", name, "what is the shape doing?", options, LETTERS[rng.randrange(4)])


def _row(
    type_id: int, data_type: str, data_id: str, question: str, options: tuple[str, ...], letter: str
) -> dict[str, Any]:
    return {
        "answer": letter,
        **{f"choice_{name}": option for name, option in zip("abcd", options, strict=True)},
        "data_id": data_id,
        "data_type": data_type,
        "question": question,
        "question_id": "",
        "question_type_id": type_id,
    }
