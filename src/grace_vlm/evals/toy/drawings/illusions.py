"""Mueller-Lyer's lines: two lines whose ends point in or out, which makes equal ones look unequal."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Rgb

FIN_PX = 9


@dataclass(frozen=True)
class Illusion:
    """From the top: (colour, length in pixels, do its fins point outwards)."""

    background: Rgb
    lines: tuple[tuple[str, int, bool], tuple[str, int, bool]]


def compose(rng: random.Random) -> Illusion:
    """Equal lines half of the time, else a quarter longer; the fins always differ."""
    color_1, color_2 = rng.sample(("black", "blue", "brown", "red", "teal"), 2)
    length, is_out = rng.randint(52, 64), rng.random() < 0.5
    lengths = rng.choice(((length, length), (length, length), (length, length * 5 // 4), (length * 5 // 4, length)))
    return Illusion(light(rng), ((color_1, lengths[0], is_out), (color_2, lengths[1], not is_out)))


def draw(illusion: Illusion) -> bytes:
    """Both lines as a PNG of 128 x 128 pixels."""
    canvas = Canvas(SIDE_PX, illusion.background)
    for (color, length, is_out), y in zip(illusion.lines, (40, 88), strict=True):
        left, right = (SIDE_PX - length) // 2, (SIDE_PX - length) // 2 + length
        canvas.line((left, y), (right, y), COLORS[color], width_px=3)
        for end, outwards in ((left, -1), (right, 1)):
            tip = end + FIN_PX * (outwards if is_out else -outwards)
            for side in (-FIN_PX, FIN_PX):
                canvas.line((end, y), (tip, y + side), COLORS[color], width_px=2)
    return canvas.png()


def compare(illusion: Illusion) -> list[Candidate]:
    """Which is longer, if any."""
    (color_1, length_1, _), (color_2, length_2, _) = illusion.lines

    def said(is_so: bool) -> str:
        return "yes" if is_so else "no"

    return [
        (f"is the {color_1} line longer than the {color_2} line?", said(length_1 > length_2)),
        (f"is the {color_2} line longer than the {color_1} line?", said(length_2 > length_1)),
        (f"are the {color_1} line and the {color_2} line equally long?", said(length_1 == length_2)),
        (f"is the {color_1} line above the {color_2} line?", "yes"),
        (f"is the {color_2} line above the {color_1} line?", "no"),
    ]


def describe(illusion: Illusion) -> str:
    """Both lines with their lengths."""
    return ", ".join(f"{color} {length} pixels" for color, length, _ in illusion.lines)


KINDS: Kinds[Illusion] = {"illusion_compare": compare}
