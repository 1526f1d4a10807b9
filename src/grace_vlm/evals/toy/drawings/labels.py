"""Labelled diagrams in two forms: names beside the parts, or the names masked by letters.

Four discs of different colours, one in each corner, some with an arrow to another. Questions name discs by colour and
place, never by label, so the same question can be asked of both forms: only the labels in its options differ.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import light
from grace_vlm.data.sources.questions import Candidate
from grace_vlm.media.canvas import COLORS, Canvas, Point, Rgb

SIDE_PX, DISC_PX = 192, 15
NAMES = ("bark", "bud", "bulb", "cone", "fruit", "leaf", "petal", "root", "seed", "stem", "thorn", "twig")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
CENTERS: tuple[Point, ...] = ((44, 44), (148, 44), (44, 140), (148, 140))
INK, PAPER = (60, 60, 60), (255, 255, 255)


@dataclass(frozen=True)
class Labels:
    """Discs in the order of ``CORNERS``: colour, name, masking letter, and the place that its arrow leads to."""

    background: Rgb
    colors: tuple[str, ...]
    names: tuple[str, ...]
    letters: tuple[str, ...]
    targets: tuple[int | None, ...]

    def arrows(self) -> list[tuple[int, int]]:
        """(from, to) of every arrow."""
        return [(place, target) for place, target in enumerate(self.targets) if target is not None]


def compose(rng: random.Random) -> Labels:
    """Four discs, at least one with an arrow."""
    targets: list[int | None] = [
        rng.choice([other for other in range(4) if other != place]) if rng.random() < 0.75 else None
        for place in range(4)
    ]
    targets[0] = rng.choice((1, 2, 3)) if set(targets) == {None} else targets[0]
    colors, names = rng.sample(sorted(COLORS), 4), rng.sample(NAMES, 4)
    return Labels(light(rng), tuple(colors), tuple(names), tuple(rng.sample("ABCD", 4)), tuple(targets))


def draw(labels: Labels, is_masked: bool) -> bytes:
    """The diagram as a PNG of 192 x 192 pixels; each label is in a box, clear of the arrows."""
    canvas = Canvas(SIDE_PX, labels.background)
    for start, end in labels.arrows():
        (x_1, y_1), (x_2, y_2) = CENTERS[start], CENTERS[end]
        edge = (DISC_PX + 2) / math.hypot(x_2 - x_1, y_2 - y_1)
        dx, dy = edge * (x_2 - x_1), edge * (y_2 - y_1)
        canvas.arrow((x_1 + dx, y_1 + dy), (x_2 - dx, y_2 - dy), INK)
    for (x, y), color, name, letter in zip(CENTERS, labels.colors, labels.names, labels.letters, strict=True):
        canvas.disc((x, y), DISC_PX, COLORS[color])
        middle = y - 27 if y < SIDE_PX / 2 else y + 27
        canvas.box(x - 22, middle - 8, x + 22, middle + 8, PAPER)
        canvas.text((x, middle), letter if is_masked else name, 14, INK)
    return canvas.png()


def shown(labels: Labels, is_masked: bool) -> tuple[str, ...]:
    """The labels that can be read, in the order of ``CORNERS``."""
    return labels.letters if is_masked else labels.names


def label_questions(labels: Labels) -> list[tuple[str, int]]:
    """(question, place of the disc whose label is the answer)."""
    found = [(f"what is the label of the {color} disc?", place) for place, color in enumerate(labels.colors)]
    found += [(f"which label is at the {corner}?", place) for place, corner in enumerate(CORNERS)]
    return found + [
        (f"what is the label of the disc that the {labels.colors[start]} disc points to?", end)
        for start, end in labels.arrows()
    ]


def color_questions(labels: Labels) -> list[Candidate]:
    """(question, colour); the labels do not matter."""
    found = [(f"what color is the disc at the {corner}?", labels.colors[at]) for at, corner in enumerate(CORNERS)]
    return found + [
        (f"what color is the disc that the {labels.colors[start]} disc points to?", labels.colors[end])
        for start, end in labels.arrows()
    ]


def count_questions(labels: Labels) -> list[Candidate]:
    """(question, number of arrows)."""
    ends = [end for _, end in labels.arrows()]
    found = [("how many arrows are there?", str(len(ends)))]
    return found + [
        (f"how many arrows point to the {color} disc?", str(ends.count(place)))
        for place, color in enumerate(labels.colors)
    ]
