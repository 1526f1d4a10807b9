"""Seven shapes that repeat in twos or threes, two rows of four cells, and a question mark in the last."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import RULE, SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, SHAPES, Canvas, Rgb

NUM_SHOWN = 7
CELL_PX = SIDE_PX // 4


@dataclass(frozen=True)
class Sequence:
    """What repeats: (colour, shape) each; colours all differ, and so do shapes."""

    background: Rgb
    period: tuple[tuple[str, str], ...]
    radius: float

    def at(self, place: int) -> tuple[str, str]:
        """(colour, shape) of a place, from 0."""
        return self.period[place % len(self.period)]


def compose(rng: random.Random) -> Sequence:
    """A period of two or three."""
    length = rng.choice((2, 3))
    colors, shapes = rng.sample(sorted(COLORS), length), rng.sample(SHAPES, length)
    return Sequence(light(rng), tuple(zip(colors, shapes, strict=True)), rng.uniform(11.0, 13.5))


def draw(sequence: Sequence) -> bytes:
    """The sequence as a PNG of 128 x 128 pixels: two rows in the middle."""
    canvas = Canvas(SIDE_PX, sequence.background)
    for row in (1, 2, 3):
        canvas.line((0, row * CELL_PX), (SIDE_PX, row * CELL_PX), RULE)
    for place in range(NUM_SHOWN + 1):
        center = ((place % 4 + 0.5) * CELL_PX, (place // 4 + 1.5) * CELL_PX)
        if place < NUM_SHOWN:
            color, shape = sequence.at(place)
            canvas.shape(shape, center, sequence.radius, COLORS[color])
        else:
            canvas.text(center, "?", 24, (60, 60, 60))
    return canvas.png()


def next_shape(sequence: Sequence) -> list[Candidate]:
    """The shape that belongs where the question mark is."""
    return [("which shape comes next?", sequence.at(NUM_SHOWN)[1])]


def next_color(sequence: Sequence) -> list[Candidate]:
    """Its colour."""
    return [("what color is the shape that comes next?", sequence.at(NUM_SHOWN)[0])]


def describe(sequence: Sequence) -> str:
    """All that is shown, in order."""
    return ", ".join(" ".join(sequence.at(place)) for place in range(NUM_SHOWN))


KINDS: Kinds[Sequence] = {"sequence_shape": next_shape, "sequence_color": next_color}
