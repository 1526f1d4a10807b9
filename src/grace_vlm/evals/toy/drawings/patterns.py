"""One pattern in one colour over the whole picture."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Rgb

PATTERNS = ("checks", "dots", "horizontal stripes", "vertical stripes")


@dataclass(frozen=True)
class Pattern:
    """A pattern, its colour, and the side of what repeats."""

    background: Rgb
    name: str
    color: str
    period_px: int


def compose(rng: random.Random) -> Pattern:
    """A pattern that repeats at least four times."""
    return Pattern(light(rng), rng.choice(PATTERNS), rng.choice(sorted(COLORS)), rng.choice((16, 20, 24, 32)))


def draw(pattern: Pattern) -> bytes:
    """The pattern as a PNG of 128 x 128 pixels."""
    canvas, color, period = Canvas(SIDE_PX, pattern.background), COLORS[pattern.color], pattern.period_px
    half = period // 2
    starts = range(0, SIDE_PX, period)
    if pattern.name == "dots":
        for x in starts:
            for y in starts:
                canvas.disc((x + half, y + half), 0.3 * period, color)
    elif pattern.name == "checks":
        for x in range(0, SIDE_PX, half):
            for y in range(0, SIDE_PX, half):
                if (x // half + y // half) % 2 == 0:
                    canvas.box(x, y, x + half - 1, y + half - 1, color)
    else:
        for at in starts:
            box = (0, at, SIDE_PX - 1, at + half - 1)
            canvas.box(*(box if pattern.name == "horizontal stripes" else (box[1], box[0], box[3], box[2])), color)
    return canvas.png()


def name(pattern: Pattern) -> list[Candidate]:
    """Which pattern it is."""
    return [("what pattern is in the picture?", pattern.name)]


def color(pattern: Pattern) -> list[Candidate]:
    """Its colour."""
    return [("what color is the pattern?", pattern.color)]


def describe(pattern: Pattern) -> str:
    """Colour and name."""
    return f"{pattern.color} {pattern.name}"


KINDS: Kinds[Pattern] = {"pattern_name": name, "pattern_color": color}
