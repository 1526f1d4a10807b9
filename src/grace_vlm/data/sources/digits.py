"""Digits in a grid of 2 x 2 or 4 x 4: reading, counting, the largest, sums of rows and columns."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from grace_vlm.data.sources.grids import RULE, SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Point, Rgb

DARK = ("black", "blue", "brown", "red", "teal")
Value = TypeVar("Value")
Table = tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Digits:
    """``values[row][column]`` and, for the drawing, each digit's colour and offset from its cell's middle."""

    background: Rgb
    size_px: int
    values: Table[int]
    colors: Table[str]
    offsets: Table[Point]


def compose(rng: random.Random) -> Digits:
    """A grid over few different digits, so that some repeat."""
    side = rng.choice((2, 4))
    size_px = rng.randint(40, 46) if side == 2 else rng.randint(24, 27)
    pool = rng.sample(range(10), rng.choice((3, 5, 7)))
    slack = 1.5

    def table(make: Callable[[], Value]) -> Table[Value]:
        return tuple(tuple(make() for _ in range(side)) for _ in range(side))

    return Digits(
        light(rng),
        size_px,
        table(lambda: rng.choice(pool)),
        table(lambda: rng.choice(DARK)),
        table(lambda: (rng.uniform(-slack, slack), rng.uniform(-slack, slack))),
    )


def draw(digits: Digits) -> bytes:
    """The digits as a PNG of 128 x 128 pixels, ruled."""
    canvas = Canvas(SIDE_PX, digits.background)
    side = len(digits.values)
    cell_px = SIDE_PX / side
    for border in range(1, side):
        at = border * cell_px
        canvas.line((at, 0), (at, SIDE_PX), RULE)
        canvas.line((0, at), (SIDE_PX, at), RULE)
    for row in range(side):
        for column in range(side):
            dx, dy = digits.offsets[row][column]
            center = ((column + 0.5) * cell_px + dx, (row + 0.5) * cell_px + dy)
            color = COLORS[digits.colors[row][column]]
            canvas.text(center, str(digits.values[row][column]), digits.size_px, color)
    return canvas.png()


def at(digits: Digits) -> list[Candidate]:
    """The digit in a row and column."""
    return [
        (f"which digit is in row {row + 1}, column {column + 1}?", str(value))
        for row, line in enumerate(digits.values)
        for column, value in enumerate(line)
    ]


def total(digits: Digits) -> list[Candidate]:
    """The sum of a row or of a column."""
    lines = {"row": digits.values, "column": tuple(zip(*digits.values, strict=True))}
    return [
        (f"what is the sum of {word} {place + 1}?", str(sum(line)))
        for word, group in lines.items()
        for place, line in enumerate(group)
    ]


def extreme(digits: Digits) -> list[Candidate]:
    """The largest and the smallest digit, of all or of a row."""
    lines = {f"in row {row + 1}": line for row, line in enumerate(digits.values)}
    lines["in the picture"] = sum(digits.values, ())
    return [
        (f"what is the {word} digit {where}?", str(choose(line)))
        for where, line in lines.items()
        for word, choose in (("largest", max), ("smallest", min))
    ]


def count(digits: Digits) -> list[Candidate]:
    """How often a digit occurs; also never."""
    values = sum(digits.values, ())
    return [(f"how many times does {digit} appear?", str(values.count(digit))) for digit in range(10)]


def describe(digits: Digits) -> str:
    """Every digit, row by row."""
    return ". ".join(" ".join(str(value) for value in line) for line in digits.values)


KINDS: Kinds[Digits] = {"digit_at": at, "digit_sum": total, "digit_max": extreme, "digit_count": count}
