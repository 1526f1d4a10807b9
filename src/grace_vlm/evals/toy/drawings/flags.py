"""Flags of three stripes: a picture that needs knowledge of the world."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import Canvas, Rgb

_WHITE, _BLACK, _RED = (255, 255, 255), (20, 20, 20), (206, 17, 38)
_BLUE, _GREEN, _YELLOW, _ORANGE = (0, 50, 160), (0, 135, 75), (252, 209, 22), (255, 130, 0)
FLAGS: dict[str, tuple[str, tuple[Rgb, Rgb, Rgb]]] = {
    # country: (how its stripes run, their colours from the left or from the top)
    "Armenia": ("horizontal", (_RED, _BLUE, _ORANGE)),
    "Belgium": ("vertical", (_BLACK, _YELLOW, _RED)),
    "Bulgaria": ("horizontal", (_WHITE, _GREEN, _RED)),
    "Estonia": ("horizontal", (_BLUE, _BLACK, _WHITE)),
    "France": ("vertical", (_BLUE, _WHITE, _RED)),
    "Germany": ("horizontal", (_BLACK, _RED, _YELLOW)),
    "Hungary": ("horizontal", (_RED, _WHITE, _GREEN)),
    "Ireland": ("vertical", (_GREEN, _WHITE, _ORANGE)),
    "Italy": ("vertical", (_GREEN, _WHITE, _RED)),
    "Lithuania": ("horizontal", (_YELLOW, _GREEN, _RED)),
    "Nigeria": ("vertical", (_GREEN, _WHITE, _GREEN)),
    "Peru": ("vertical", (_RED, _WHITE, _RED)),
    "Romania": ("vertical", (_BLUE, _YELLOW, _RED)),
    "Russia": ("horizontal", (_WHITE, _BLUE, _RED)),
}


@dataclass(frozen=True)
class Flag:
    """A country, and where its flag hangs."""

    country: str
    wall: Rgb
    left: int
    top: int


def compose(rng: random.Random) -> Flag:
    """A flag on a gray wall."""
    gray = rng.randint(160, 210)
    return Flag(rng.choice(sorted(FLAGS)), (gray, gray, gray), rng.randint(5, 15), rng.randint(15, 40))


def draw(flag: Flag) -> bytes:
    """The flag, 108 x 72, in a PNG of 128 x 128 pixels."""
    canvas = Canvas(SIDE_PX, flag.wall)
    direction, colors = FLAGS[flag.country]
    for place, color in enumerate(colors):
        if direction == "vertical":
            left = flag.left + 36 * place
            canvas.box(left, flag.top, left + 35, flag.top + 71, color)
        else:
            top = flag.top + 24 * place
            canvas.box(flag.left, top, flag.left + 107, top + 23, color)
    return canvas.png()


def country(flag: Flag) -> list[Candidate]:
    """Whose flag it is."""
    return [("which country has this flag?", flag.country)]


def describe(flag: Flag) -> str:
    """The country."""
    return f"the flag of {flag.country}"


KINDS: Kinds[Flag] = {"flag_country": country}
