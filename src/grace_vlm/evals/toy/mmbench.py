"""MMBench's layout: one TSV with pictures in base64; every rotation of a question's options is a row of its own.

    mmbench_dev_en_toy.tsv

Row k * 10^6 + index has the options of row ``index`` turned k places to the left. A question has two to four options;
the cells of the others, and of a hint that is not there, are empty, which pandas reads as NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grace_vlm.evals.toy.deck import LETTERS, Deck, Item
from grace_vlm.evals.toy.layout import encode_picture, write_tsv

NAME = "mmbench"
FILE = "mmbench_dev_en_toy.tsv"
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "source", "split",
           "image")  # fmt: skip
ROTATION_STEP = 1_000_000
_INSTANCE, _CROSS = "finegrained_perception (instance-level)", "finegrained_perception (cross-instance)"
_COARSE, _LOGIC = "coarse_perception", "logic_reasoning"
_RELATION, _ATTRIBUTE = "relation_reasoning", "attribute_reasoning"
PLAN = (
    # (room, kind, options, questions, category, l2-category)
    ("grids", "scene_color_at", 4, 10, "attribute_recognition", _INSTANCE),
    ("grids", "scene_shape_at", 4, 8, "attribute_recognition", _INSTANCE),
    ("grids", "scene_count_shape", 4, 10, "object_localization", _INSTANCE),
    ("grids", "scene_neighbor", 4, 6, "spatial_relationship", _CROSS),
    ("charts", "chart_max", 4, 9, "attribute_comparison", _CROSS),
    ("charts", "chart_value", 4, 6, "structuralized_imagetext_understanding", _LOGIC),
    ("charts", "chart_difference", 4, 4, "structuralized_imagetext_understanding", _LOGIC),
    ("digits", "digit_at", 4, 6, "ocr", _INSTANCE),
    ("digits", "digit_sum", 4, 3, "structuralized_imagetext_understanding", _LOGIC),
    ("flags", "flag_country", 4, 10, "identity_reasoning", _ATTRIBUTE),
    ("faces", "face_mood", 4, 3, "image_emotion", _COARSE),
    ("diagrams", "diagram_color", 3, 6, "physical_relation", _RELATION),
    ("diagrams", "diagram_in", 3, 6, "physical_relation", _RELATION),
    ("charts", "chart_count", 3, 4, "object_localization", _INSTANCE),
    ("grids", "scene_count_both", 3, 4, "object_localization", _INSTANCE),
    ("grids", "scene_relation", 2, 2, "spatial_relationship", _CROSS),
    ("charts", "chart_compare", 2, 3, "attribute_comparison", _CROSS),
)
HINTS = {
    "scene_color_at": "Rows and columns are counted from 1,\nbeginning at the top left.",
    "chart_value": "One rule is one unit.",
    "flag_country": "A flag with three stripes.",
}


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write the file; returns what is in it."""
    deck = Deck(NAME, seed)
    questions = [
        (deck.deal(room, kind, num_options), kind, category, l2_category)
        for room, kind, num_options, number, category, l2_category in PLAN
        for _ in range(number)
    ]
    deck.rng("order").shuffle(questions)
    rows = [
        row
        for turn in range(4)
        for index, (item, kind, *categories) in enumerate(questions)
        for row in _rotation(index, turn, item, kind, categories)
    ]
    write_tsv(folder / FILE, COLUMNS, rows)
    return {"rows": len(rows), "pictures": len(questions), "questions": len(questions)}


def _rotation(index: int, turn: int, item: Item, kind: str, categories: list[str]) -> Iterator[dict[str, Any]]:
    """The row of one turn; none if the question has fewer options."""
    if turn >= len(item.options):
        return
    options = item.options[turn:] + item.options[:turn]
    yield {
        "index": turn * ROTATION_STEP + index,
        "question": item.question,
        "hint": HINTS.get(kind),
        **{letter: options[place] if place < len(options) else None for place, letter in enumerate("ABCD")},
        "answer": LETTERS[options.index(item.text)],
        "category": categories[0],
        "l2-category": categories[1],
        "source": "grace-vlm toy suite",
        "split": "dev",
        "image": encode_picture(item.png),
    }
