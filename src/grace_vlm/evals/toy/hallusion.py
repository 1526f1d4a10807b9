"""HallusionBench's layout: yes/no questions in sets, each asked of an original picture and of an edited one.

    image-00000-of-00001.parquet       rows with a picture (visual_input 1: original, 2: edited)
    non_image-00000-of-00001.parquet   figure 0 of visual-supplement sets: the same question without one (0)

VS (visual supplement): tables and bars of facts of the world. Without a picture the world answers; with one, the
picture does, and in the edited one two values have changed places. VD (visual dependent): the demo's scenes and line
illusions, and an edit that turns at least one answer. Set ids begin at 0 in each subcategory, so only the whole key
(category, subcategory, set, figure or question) groups.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grace_vlm.data.sources import charts, diagrams, digits, grids
from grace_vlm.data.sources.grids import light
from grace_vlm.evals.toy.deck import Deck
from grace_vlm.evals.toy.drawings import illusions, tables
from grace_vlm.evals.toy.layout import picture, write_parquet
from grace_vlm.evals.toy.rooms import Scene

NAME = "hallusion"
COLUMNS = {
    "category": "string",
    "subcategory": "string",
    "visual_input": "string",
    "set_id": "string",
    "figure_id": "string",
    "question_id": "string",
    "question": "string",
    "gt_answer": "string",
    "gt_answer_details": "string",
    "image": "image",
}
FACTS: dict[str, dict[str, int]] = {
    "legs": {"spider": 8, "bee": 6, "cat": 4, "hen": 2, "crab": 10, "snake": 0},
    "wheels": {"car": 4, "bicycle": 2, "tricycle": 3, "unicycle": 1},
    "corners": {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8},
    "strings": {"violin": 4, "guitar": 6, "banjo": 5, "balalaika": 3},
}
VS_SETS = {"chart": 4, "table": 4}
VD_SETS = {"figure": 18, "math": 4, "ocr": 3, "illusion": 3}
NUM_QUESTIONS = 3

Answers = Mapping[str, str]
"""Question -> ``yes`` or ``no``."""


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write both files; returns what is in them."""
    rows = [*_supplement_rows(seed), *_dependent_rows(seed)]
    with_image = [row for row in rows if row["image"] is not None]
    without = [row for row in rows if row["image"] is None]
    write_parquet(folder / "image-00000-of-00001.parquet", COLUMNS, with_image)
    write_parquet(folder / "non_image-00000-of-00001.parquet", COLUMNS, without)
    keys = ("category", "subcategory", "set_id")
    figures = {tuple(row[key] for key in (*keys, "figure_id")) for row in with_image}
    questions = {tuple(row[key] for key in (*keys, "question_id")) for row in rows}
    return {"rows": len(rows), "pictures": len(figures), "text_only": len(without), "questions": len(questions)}


def _supplement_rows(seed: int) -> Iterator[dict[str, Any]]:
    rng = Deck(NAME, seed).rng("VS")
    draw = {"chart": tables.draw_bars, "table": tables.draw}
    for subcategory, num_sets in VS_SETS.items():
        for number in range(num_sets):
            topic = sorted(FACTS)[number % len(FACTS)]
            names = rng.sample(sorted(FACTS[topic]), 3)
            true = tables.Table(light(rng), topic, tuple((name, FACTS[topic][name]) for name in names))
            false = edit_table(rng, true)
            asked = _choose(rng, table_answers(true), table_answers(false), NUM_QUESTIONS)
            yield from _rows(("VS", subcategory, number, 0), asked, table_answers(true), "without a picture", None)
            for figure, table in enumerate((true, false), 1):
                png = draw[subcategory](table)
                yield from _rows(
                    ("VS", subcategory, number, figure), asked, table_answers(table), tables.describe(table), png
                )


def _dependent_rows(seed: int) -> Iterator[dict[str, Any]]:
    rng = Deck(NAME, seed).rng("VD")
    for subcategory, num_sets in VD_SETS.items():
        for number in range(num_sets):
            family, answers = _FAMILIES[subcategory][number % len(_FAMILIES[subcategory])]
            asked: list[str] = []
            while not asked:
                scene = family.compose(rng)
                edited = _EDITS[family.__name__](rng, scene)
                asked = _choose(rng, answers(scene), answers(edited), NUM_QUESTIONS)
            for figure, shown in enumerate((scene, edited)):
                yield from _rows(
                    ("VD", subcategory, number, figure),
                    asked,
                    answers(shown),
                    family.describe(shown),
                    family.draw(shown),
                )


def _rows(
    place: tuple[str, str, int, int], asked: Sequence[str], answers: Answers, details: str, png: bytes | None
) -> Iterator[dict[str, Any]]:
    category, subcategory, set_id, figure = place
    original = 1 if category == "VS" else 0
    visual_input = "0" if png is None else "1" if figure == original else "2"
    for number, question in enumerate(asked):
        yield {
            "category": category,
            "subcategory": subcategory,
            "visual_input": visual_input,
            "set_id": str(set_id),
            "figure_id": str(figure),
            "question_id": str(number),
            "question": question,
            "gt_answer": "1" if answers[question] == "yes" else "0",
            "gt_answer_details": f"{answers[question]}: {details}",
            "image": picture(png),
        }


def _choose(rng: random.Random, first: Answers, second: Answers, num_questions: int) -> list[str]:
    """Questions with an answer in both scenes: two that turn, one each way if there is one, and others that stay, yes
    as often as no over many sets. Nothing if there are too few."""
    common = sorted(first.keys() & second.keys())
    rng.shuffle(common)
    turning = [question for question in common if first[question] != second[question]]
    back = [question for question in turning[1:] if first[question] != first[turning[0]]]
    chosen = turning[:1] + (back or turning[1:])[:1]
    wanted = rng.choice(("yes", "no"))
    staying = [question for question in common if first[question] == second[question]]
    staying.sort(key=lambda question: first[question] != wanted)
    chosen += staying[: num_questions - len(chosen)]
    return chosen if turning and len(chosen) == num_questions else []


def table_answers(table: tables.Table) -> dict[str, str]:
    """Comparisons and values, of a table whose title says what is counted."""
    word, found = table.title, dict[str, str]()
    for name, value in table.rows:
        for other, less in table.rows:
            if name != other:
                found[f"does {_one(name)} have more {word} than {_one(other)}?"] = _said(value > less)
        for number in sorted({number for _, number in table.rows}):
            found[f"does {_one(name)} have {number} {word}?"] = _said(value == number)
    return found


def scene_answers(kinds: Mapping[str, Callable[[Scene], list[tuple[str, str]]]]) -> Callable[[Scene], dict[str, str]]:
    """All yes/no questions of these kinds."""
    return lambda scene: {q: a for listing in kinds.values() for q, a in listing(scene) if a in ("yes", "no")}


def digit_answers(scene: digits.Digits) -> dict[str, str]:
    """Whether a digit is in a row and column: each of the digits that occur."""
    values = sorted({value for line in scene.values for value in line})
    return {
        f"is there a {value} in row {r + 1}, column {c + 1}?": _said(value == shown)
        for r, line in enumerate(scene.values)
        for c, shown in enumerate(line)
        for value in values
    }


def sum_answers(scene: digits.Digits) -> dict[str, str]:
    """Whether a row's sum is a value: that of any row, and one more."""
    sums = [sum(line) for line in scene.values]
    values = sorted({value + more for value in sums for more in (0, 1)})
    return {
        f"is the sum of row {row + 1} equal to {value}?": _said(value == total)
        for row, total in enumerate(sums)
        for value in values
    }


def _one(noun: str) -> str:
    """With its article."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def _said(is_so: bool) -> str:
    return "yes" if is_so else "no"


def edit_table(rng: random.Random, table: tables.Table) -> tables.Table:
    """Two values change places."""
    values = [value for _, value in table.rows]
    return replace(table, rows=tuple(zip([name for name, _ in table.rows], swap(rng, values), strict=True)))


def edit_grid(rng: random.Random, grid: grids.Grid) -> grids.Grid:
    """Two shapes change places, colours and all, and one becomes another colour of the picture."""
    places = [(row, column) for row, column, _ in grid.filled()]
    (r_1, c_1), (r_2, c_2), (r_3, c_3) = rng.sample(places, 3)
    cells = [list(line) for line in grid.cells]
    first, second, third = cells[r_1][c_1], cells[r_2][c_2], cells[r_3][c_3]
    assert first is not None
    assert second is not None
    assert third is not None
    cells[r_1][c_1] = replace(first, color=second.color, shape=second.shape)
    cells[r_2][c_2] = replace(second, color=first.color, shape=first.shape)
    colors = sorted({cell.color for _, _, cell in grid.filled()} - {third.color}) or [third.color]
    cells[r_3][c_3] = replace(third, color=rng.choice(colors))
    return replace(grid, cells=tuple(tuple(line) for line in cells))


def edit_chart(rng: random.Random, chart: charts.Chart) -> charts.Chart:
    """Two bars change heights."""
    values = swap(rng, [value for _, value in chart.bars])
    return replace(chart, bars=tuple(zip([color for color, _ in chart.bars], values, strict=True)))


def edit_diagram(rng: random.Random, diagram: diagrams.Diagram) -> diagrams.Diagram:
    """One node's arrow leads elsewhere."""
    nodes = list(diagram.nodes)
    place = rng.randrange(len(nodes))
    others = [node.letter for node in nodes if node.letter not in (nodes[place].letter, nodes[place].target)]
    nodes[place] = replace(nodes[place], target=rng.choice(others))
    return replace(diagram, nodes=tuple(nodes))


def edit_digits(rng: random.Random, scene: digits.Digits) -> digits.Digits:
    """In each of two rows one digit becomes another that occurs."""
    values = [list(line) for line in scene.values]
    shown = sorted({value for line in values for value in line})
    for row in rng.sample(range(len(values)), 2):
        column = rng.randrange(len(values[row]))
        values[row][column] = rng.choice([value for value in shown if value != values[row][column]] or shown)
    return replace(scene, values=tuple(tuple(line) for line in values))


def edit_illusion(rng: random.Random, scene: illusions.Illusion) -> illusions.Illusion:
    """The first line becomes longer, as long as, or shorter than the second; the fins stay."""
    (color_1, length_1, is_out_1), second = scene.lines
    length = rng.choice([value for value in (second[1] * 4 // 5, second[1], second[1] * 5 // 4) if value != length_1])
    return replace(scene, lines=((color_1, length, is_out_1), second))


def swap(rng: random.Random, values: Sequence[int]) -> list[int]:
    """Two different places exchanged."""
    first, second = rng.sample(range(len(values)), 2)
    swapped = list(values)
    swapped[first], swapped[second] = values[second], values[first]
    return swapped


_EDITS: dict[str, Callable[[random.Random, Any], Scene]] = {
    grids.__name__: edit_grid,
    charts.__name__: edit_chart,
    diagrams.__name__: edit_diagram,
    digits.__name__: edit_digits,
    illusions.__name__: edit_illusion,
}
_FAMILIES: dict[str, tuple[tuple[Any, Callable[[Scene], dict[str, str]]], ...]] = {
    # subcategory: (what is drawn, what is asked), by turns
    "figure": (
        (grids, scene_answers(grids.KINDS)),
        (charts, scene_answers(charts.KINDS)),
        (grids, scene_answers(grids.KINDS)),
        (diagrams, scene_answers(diagrams.KINDS)),
    ),
    "math": ((grids, scene_answers({"scene_compare": grids.compare})), (digits, sum_answers)),
    "ocr": ((digits, digit_answers),),
    "illusion": ((illusions, scene_answers(illusions.KINDS)),),
}
