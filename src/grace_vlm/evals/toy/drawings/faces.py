"""Faces with one of four moods, told by the mouth."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

from grace_vlm.data.sources.grids import SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Point, Rgb

MOODS = ("calm", "happy", "sad", "surprised")
INK = (40, 40, 40)


@dataclass(frozen=True)
class Face:
    """A mood, a colour and where the face stands."""

    background: Rgb
    mood: str
    color: str
    center: Point
    radius: float


def compose(rng: random.Random) -> Face:
    """A face in a colour on which the mouth is seen."""
    radius = rng.uniform(40, 54)
    center = (SIDE_PX / 2 + rng.uniform(-8, 8), SIDE_PX / 2 + rng.uniform(-8, 8))
    return Face(light(rng), rng.choice(MOODS), rng.choice(("gray", "green", "red", "yellow")), center, radius)


def draw(face: Face) -> bytes:
    """The face as a PNG of 128 x 128 pixels."""
    canvas = Canvas(SIDE_PX, face.background)
    (x, y), r = face.center, face.radius
    canvas.disc(face.center, r, COLORS[face.color])
    for side in (-0.36, 0.36):
        canvas.disc((x + side * r, y - 0.3 * r), 0.11 * r, INK)
    if face.mood == "surprised":
        canvas.disc((x, y + 0.42 * r), 0.2 * r, INK)
    else:
        bend = {"calm": 0.0, "happy": 0.3, "sad": -0.3}[face.mood]
        turns = [step / 12 for step in range(-12, 13)]
        mouth = [(x + 0.5 * r * t, y + 0.4 * r + bend * r * math.cos(math.pi * t / 2)) for t in turns]
        for start, end in pairwise(mouth):
            canvas.line(start, end, INK, width_px=3)
    return canvas.png()


def mood(face: Face) -> list[Candidate]:
    """What the mouth tells."""
    return [("how does the face feel?", face.mood)]


def describe(face: Face) -> str:
    """Colour and mood."""
    return f"a {face.color} face that is {face.mood}"


KINDS: Kinds[Face] = {"face_mood": mood}
