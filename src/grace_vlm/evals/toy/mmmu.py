"""MMMU's layout: a folder a subject, up to seven pictures a row, options as the text of a list, open questions.

    <Subject>/validation-00000-of-00001.parquet

Thirty subjects with three rows each; the names are MMMU's, the questions are about charts, numbers and tables in all
of them. One row in six is open (``options`` is ``[]``): its gold is a number, a word, or the text of a list of answers
that all count. Of the others, some have two pictures, and some have pictures as options.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from grace_vlm.data.sources import charts, digits
from grace_vlm.data.sources.questions import pick
from grace_vlm.evals.toy.deck import LETTERS, Deck
from grace_vlm.evals.toy.layout import picture, write_parquet
from grace_vlm.evals.toy.rooms import ROOMS

NAME = "mmmu"
NUM_IMAGES = 7
COLUMNS = {
    "id": "string",
    "question": "string",
    "options": "string",
    "explanation": "string",
    **{f"image_{number}": "image" for number in range(1, NUM_IMAGES + 1)},
    "img_type": "string",
    "answer": "string",
    "topic_difficulty": "string",
    "question_type": "string",
    "subfield": "string",
}
SUBJECTS = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design", "Diagnostics_and_Laboratory_Medicine",
    "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography", "History", "Literature", "Manage",
    "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology",
    "Public_Health", "Sociology",
)  # fmt: skip
NUM_PER_SUBJECT = 3
SINGLE = (
    # (room, kind, options)
    ("charts", "chart_max", 4),
    ("digits", "digit_sum", 4),
    ("tables", "table_total", 4),
    ("charts", "chart_value", 5),
    ("diagrams", "diagram_color", 3),
    ("tables", "table_extreme", 4),
    ("charts", "chart_difference", 4),
    ("digits", "digit_count", 2),
    ("polygons", "polygon_corners", 6),
)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write a file a subject; returns what is in all of them."""
    deck = Deck(NAME, seed)
    rows: list[dict[str, Any]] = []
    for number in range(len(SUBJECTS) * NUM_PER_SUBJECT):
        subject, place = SUBJECTS[number // NUM_PER_SUBJECT], number % NUM_PER_SUBJECT
        content, pngs = _compose(deck, number)
        rows.append(_row(f"validation_{subject}_{place + 1}", content, pngs))
    for first in range(0, len(rows), NUM_PER_SUBJECT):
        subject = SUBJECTS[first // NUM_PER_SUBJECT]
        path = folder / subject / "validation-00000-of-00001.parquet"
        write_parquet(path, COLUMNS, rows[first : first + NUM_PER_SUBJECT])
    num_pictures = sum(row[f"image_{n}"] is not None for row in rows for n in range(1, NUM_IMAGES + 1))
    return {"rows": len(rows), "pictures": num_pictures, "open": sum(row["question_type"] == "open" for row in rows)}


def _row(row_id: str, content: dict[str, str], pngs: list[bytes]) -> dict[str, Any]:
    images = [*pngs, *[None] * (NUM_IMAGES - len(pngs))]
    values = {
        "id": row_id,
        "explanation": "",
        **{f"image_{number}": picture(png) for number, png in enumerate(images, 1)},
        "img_type": str(["Plots and Charts"]),
        "topic_difficulty": "Easy" if len(pngs) == 1 else "Medium",
        "subfield": "Toy",
        **content,
    }
    return {name: values[name] for name in COLUMNS}


def _compose(deck: Deck, number: int) -> tuple[dict[str, str], list[bytes]]:
    """(the columns that depend on the question, its pictures) of row ``number``."""
    rng = deck.rng(f"row {number}")
    if number % 6 == 5:
        make = (_open_number, _open_word, _open_list)[number // 6 % 3]
        question, gold, png = make(rng)
        return _content(rng, question, [], gold), [png]
    if number % 6 == 2:
        return _two_charts(rng)
    if number % 6 == 4:
        return _chart_options(rng, has_question_image=number // 6 % 2 == 0)
    item = deck.deal(*SINGLE[number // 6 % len(SINGLE)])
    return _content(rng, item.question, list(item.options), item.letter), [item.png]


def _content(rng: random.Random, question: str, options: list[str], answer: str) -> dict[str, str]:
    """The marker of the first picture goes before or after the question, where it has none yet."""
    if "<image" not in question and not any("<image" in option for option in options):
        question = f"<image 1> {question}" if rng.random() < 0.5 else f"{question}\n<image 1>"
    return {
        "question": question,
        "options": str(options),
        "answer": answer,
        "question_type": "multiple-choice" if options else "open",
    }


def _two_charts(rng: random.Random) -> tuple[dict[str, str], list[bytes]]:
    """In which of two charts is a bar taller?"""
    while True:
        first, second = charts.compose(rng), charts.compose(rng)
        heights, others = dict(first.bars), dict(second.bars)
        common = [color for color in sorted(heights.keys() & others.keys()) if heights[color] != others[color]]
        if common:
            break
    color = rng.choice(common)
    question = f"<image 1> and <image 2> are two charts. in which is the {color} bar taller?"
    options = ["the first", "the second"]
    content = _content(rng, question, options, "A" if heights[color] > others[color] else "B")
    return content, [charts.draw(first), charts.draw(second)]


def _chart_options(rng: random.Random, has_question_image: bool) -> tuple[dict[str, str], list[bytes]]:
    """Which of four charts, which are the options, has a tallest bar of one colour: named, or as in a fifth chart."""
    shown: dict[str, charts.Chart] = {}
    while len(shown) < 4:
        chart = charts.compose(rng)
        shown.setdefault(_tallest(chart), chart)
    color = rng.choice(list(shown))
    pngs = [charts.draw(chart) for chart in shown.values()]
    question = f"in which chart is the {color} bar the tallest?"
    if has_question_image:
        other = charts.compose(rng)
        while _tallest(other) != color or other in shown.values():
            other = charts.compose(rng)
        pngs.insert(0, charts.draw(other))
        question = "which chart has its tallest bar in the same color as that of <image 1>?"
    first = 2 if has_question_image else 1
    options = [f"<image {number}>" for number in range(first, first + 4)]
    return _content(rng, question, options, LETTERS[list(shown).index(color)]), pngs


def _tallest(chart: charts.Chart) -> str:
    return max(chart.bars, key=lambda bar: bar[1])[0]


def _open_number(rng: random.Random) -> tuple[str, str, bytes]:
    """The mean of a row of digits: often no whole number."""
    scene = digits.compose(rng)
    row = rng.randrange(len(scene.values))
    mean = sum(scene.values[row]) / len(scene.values[row])
    return f"what is the mean of row {row + 1}?", f"{mean:g}", digits.draw(scene)


def _open_word(rng: random.Random) -> tuple[str, str, bytes]:
    """A colour."""
    chart = charts.compose(rng)
    return (*pick(rng, charts.extreme(chart)), charts.draw(chart))


def _open_list(rng: random.Random) -> tuple[str, str, bytes]:
    """A small number, as a figure or as a word."""
    room = ROOMS["grids"]
    scene = room.compose(rng)
    counts = [(question, answer) for question, answer in room.kinds["scene_count_shape"](scene) if int(answer) <= 10]
    question, answer = pick(rng, counts)
    return question, str([answer, NUMBER_WORDS[int(answer)]]), room.draw(scene)
