"""The outline of one polygon with three to eight corners."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Rgb


@dataclass(frozen=True)
class Polygon:
    """Corners on a circle, each moved a little along it; ``turns`` are fractions of a full turn."""

    background: Rgb
    color: str
    radius: float
    turns: tuple[float, ...]


def compose(rng: random.Random) -> Polygon:
    """Corners far enough apart to be told apart."""
    num_corners, start = rng.randint(3, 8), rng.random()
    turns = tuple(start + (corner + rng.uniform(-0.16, 0.16)) / num_corners for corner in range(num_corners))
    return Polygon(light(rng), rng.choice(sorted(COLORS)), rng.uniform(46, 58), turns)


def draw(polygon: Polygon) -> bytes:
    """The outline as a PNG of 128 x 128 pixels, a dot at each corner."""
    canvas, middle = Canvas(SIDE_PX, polygon.background), SIDE_PX / 2
    angles = [2 * math.pi * turn for turn in polygon.turns]
    points = [(middle + polygon.radius * math.cos(a), middle + polygon.radius * math.sin(a)) for a in angles]
    for start, end in zip(points, [*points[1:], points[0]], strict=True):
        canvas.line(start, end, COLORS[polygon.color], width_px=3)
    for point in points:
        canvas.disc(point, 4, COLORS[polygon.color])
    return canvas.png()


def corners(polygon: Polygon) -> list[Candidate]:
    """How many corners, which are as many as sides."""
    number = str(len(polygon.turns))
    return [("how many corners are there?", number), ("how many sides are there?", number)]


def describe(polygon: Polygon) -> str:
    """Colour and corners."""
    return f"a {polygon.color} polygon with {len(polygon.turns)} corners"


KINDS: Kinds[Polygon] = {"polygon_corners": corners}
