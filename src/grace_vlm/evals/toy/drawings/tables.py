"""Three or four named whole numbers, as a ruled table or as bars with their names below."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import RULE, SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Rgb

NAMES = ("ants", "bees", "cats", "cows", "dogs", "ducks", "goats", "hens", "owls", "pigs")
INK, STRONG_RULE = (40, 40, 40), (120, 120, 120)


@dataclass(frozen=True)
class Table:
    """(name, value) from the top or from the left, under ``title``; values from 0 to 12, none twice."""

    background: Rgb
    title: str
    rows: tuple[tuple[str, int], ...]


def compose(rng: random.Random) -> Table:
    """How many animals of each kind."""
    num_rows = rng.choice((3, 4))
    names, values = rng.sample(NAMES, num_rows), rng.sample(range(1, 13), num_rows)
    return Table(light(rng), "on the farm", tuple(zip(names, values, strict=True)))


def draw(table: Table) -> bytes:
    """The table as a PNG of 128 x 128 pixels, a line a row."""
    canvas = Canvas(SIDE_PX, table.background)
    step = SIDE_PX / (len(table.rows) + 1)
    canvas.text((SIDE_PX / 2, step / 2), table.title, 15, INK)
    for place, (name, value) in enumerate(table.rows, 1):
        color = STRONG_RULE if place == 1 else RULE
        canvas.line((4, place * step), (SIDE_PX - 4, place * step), color)
        canvas.text((48, (place + 0.5) * step), name, 15, INK)
        canvas.text((106, (place + 0.5) * step), str(value), 17, INK)
    canvas.line((90, step), (90, SIDE_PX - 4), STRONG_RULE)
    return canvas.png()


def draw_bars(table: Table) -> bytes:
    """The same as bars: a rule every two units, the value above each bar."""
    canvas, base, unit = Canvas(SIDE_PX, table.background), 112, 7
    canvas.text((SIDE_PX / 2, 9), table.title, 12, INK)
    for value in range(0, 13, 2):
        canvas.line((2, base - value * unit), (SIDE_PX - 2, base - value * unit), RULE)
    step = SIDE_PX / len(table.rows)
    size_px = 9 if max(len(name) for name, _ in table.rows) > 5 else 11
    for place, (name, value) in enumerate(table.rows):
        x = (place + 0.5) * step
        canvas.box(round(x - step / 4), base - value * unit, round(x + step / 4), base, COLORS["teal"])
        canvas.text((x, base - value * unit - 6), str(value), 11, INK)
        canvas.text((x, base + 8), name, size_px, INK)
    return canvas.png()


def value(table: Table) -> list[Candidate]:
    """One value by its name."""
    return [(f"how many {name} are there?", str(value)) for name, value in table.rows]


def extreme(table: Table) -> list[Candidate]:
    """The name with the largest and the smallest value."""
    ranked = sorted(table.rows, key=lambda row: row[1])
    return [("of which are there the most?", ranked[-1][0]), ("of which are there the fewest?", ranked[0][0])]


def total(table: Table) -> list[Candidate]:
    """The sum of two values."""
    return [
        (f"how many {a} and {b} are there in all?", str(m + n)) for a, m in table.rows for b, n in table.rows if a < b
    ]


def describe(table: Table) -> str:
    """Title and rows."""
    return f"{table.title}: " + ", ".join(f"{name} {value}" for name, value in table.rows)


KINDS: Kinds[Table] = {"table_value": value, "table_extreme": extreme, "table_total": total}
