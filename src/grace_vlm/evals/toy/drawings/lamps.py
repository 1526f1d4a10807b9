"""Lamps between two wires, each with its own switch: a lamp is on if its switch is closed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Rgb

TOP_PX, BOTTOM_PX = 16, 112
INK = (40, 40, 40)


@dataclass(frozen=True)
class Lamps:
    """From left to right: (colour, is its switch closed)."""

    background: Rgb
    branches: tuple[tuple[str, bool], ...]


def compose(rng: random.Random) -> Lamps:
    """Three to five lamps of different colours."""
    colors = rng.sample(sorted(COLORS), rng.choice((3, 4, 5)))
    return Lamps(light(rng), tuple((color, rng.random() < 0.5) for color in colors))


def draw(lamps: Lamps) -> bytes:
    """The wiring as a PNG of 128 x 128 pixels; an open switch stands off its contact."""
    canvas = Canvas(SIDE_PX, lamps.background)
    for y in (TOP_PX, BOTTOM_PX):
        canvas.line((6, y), (SIDE_PX - 6, y), INK, width_px=2)
    step = SIDE_PX / len(lamps.branches)
    for place, (color, is_closed) in enumerate(lamps.branches):
        x = (place + 0.5) * step
        canvas.line((x, TOP_PX), (x, 30), INK, width_px=2)
        canvas.line((x, 54), (x, BOTTOM_PX), INK, width_px=2)
        canvas.line((x if is_closed else x - 10, 32), (x, 54), INK, width_px=2)
        for y in (30, 54):
            canvas.disc((x, y), 2.5, INK)
        canvas.disc((x, 84), 9, COLORS[color])
    return canvas.png()


def count(lamps: Lamps) -> list[Candidate]:
    """How many are on, and off."""
    num_on = sum(is_closed for _, is_closed in lamps.branches)
    return [("how many lamps are on?", str(num_on)), ("how many lamps are off?", str(len(lamps.branches) - num_on))]


def is_on(lamps: Lamps) -> list[Candidate]:
    """One lamp by its colour."""
    return [(f"is the {color} lamp on?", "yes" if is_closed else "no") for color, is_closed in lamps.branches]


def describe(lamps: Lamps) -> str:
    """Every lamp, from left to right."""
    return ", ".join(f"{color} {'on' if is_closed else 'off'}" for color, is_closed in lamps.branches)


KINDS: Kinds[Lamps] = {"lamp_count": count, "lamp_on": is_on}
