"""AI2D's layout: Parquet with a list of four options and the answer as a string; twice, with and without the mask.

    masked/test-00000-of-00001.parquet   no_mask/test-00000-of-00001.parquet

Row i of both asks the same of the same diagram. Where the labels are masked, letters stand in their place, in the
picture and among the options; the number of the right option is the same.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from grace_vlm.data.sources.questions import pick, wrong_answers
from grace_vlm.evals.toy.deck import Deck
from grace_vlm.evals.toy.drawings import labels
from grace_vlm.evals.toy.layout import picture, write_parquet

NAME = "ai2d"
COLUMNS = {"question": "string", "options": "strings", "answer": "string", "image": "image"}
NUM_ROWS = 120
FOLDERS = {"masked": True, "no_mask": False}
"""Folder -> are the labels masked."""


Asked = tuple[labels.Labels, str, list[int] | list[str], int]
"""A diagram, a question, its options in order (places whose labels are meant, or words), and the index of the right."""


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write both files; returns what is in each."""
    deck, seen = Deck(NAME, seed), set[tuple[labels.Labels, str]]()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FOLDERS}
    for number in range(NUM_ROWS):
        rng = deck.rng(str(number))
        asked = _ask(rng, number)
        while asked[:2] in seen:
            asked = _ask(rng, number)
        seen.add(asked[:2])
        for name, is_masked in FOLDERS.items():
            rows[name].append(_row(*asked, is_masked))
    for name in FOLDERS:
        write_parquet(folder / name / "test-00000-of-00001.parquet", COLUMNS, rows[name])
    return {"rows": NUM_ROWS, "pictures": NUM_ROWS}


def _ask(rng: random.Random, number: int) -> Asked:
    """Every other question is about a label, the rest by turns about a colour and a number of arrows."""
    diagram = labels.compose(rng)
    if number % 2 == 0:
        question, place = rng.choice(labels.label_questions(diagram))
        places = rng.sample(range(4), 4)
        return diagram, question, places, places.index(place)
    listing = labels.color_questions if number % 4 == 1 else labels.count_questions
    question, answer = pick(rng, listing(diagram))
    words = [answer, *rng.sample(wrong_answers(answer), 3)]
    rng.shuffle(words)
    return diagram, question, words, words.index(answer)


def _row(
    diagram: labels.Labels, question: str, options: list[int] | list[str], answer: int, is_masked: bool
) -> dict[str, Any]:
    shown = labels.shown(diagram, is_masked)
    return {
        "question": question,
        "options": [shown[option] if isinstance(option, int) else option for option in options],
        "answer": str(answer),
        "image": picture(labels.draw(diagram, is_masked)),
    }
