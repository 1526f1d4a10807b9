"""What is behind things, grounds of a named colour, so that it can be asked about, or of a pattern of two; and the
things themselves, as a package has them."""

from __future__ import annotations

import random
from pathlib import Path

from grace_vlm.errors import DataError
from grace_vlm.media.canvas import Rgb
from grace_vlm.media.collage import PATTERNS, Cutout, Ground, load_cutout
from grace_vlm.media.header import ImageFault

GROUND_COLORS: dict[str, tuple[Rgb, ...]] = {
    "white": ((255, 255, 255), (247, 247, 245)),
    "gray": ((150, 150, 150), (190, 190, 192)),
    "black": ((12, 12, 14), (30, 30, 32)),
    "red": ((205, 40, 40), (230, 70, 65)),
    "orange": ((245, 150, 40), (250, 170, 80)),
    "yellow": ((250, 225, 70), (250, 235, 130)),
    "green": ((60, 160, 75), (140, 210, 140)),
    "blue": ((50, 100, 210), (140, 185, 240)),
    "purple": ((125, 60, 170), (180, 140, 215)),
    "pink": ((245, 150, 185), (250, 190, 210)),
    "brown": ((120, 75, 40), (150, 105, 65)),
}


def choose_ground(rng: random.Random) -> tuple[Ground, str | None]:
    """A ground, and its colour's name where it is plain."""
    pattern = rng.choices(PATTERNS, (6, 2, 1, 1, 2))[0]
    color = rng.choice(list(GROUND_COLORS))
    first = _near(rng, rng.choice(GROUND_COLORS[color]))
    if pattern == "plain":
        return Ground(pattern, first, first), color
    if pattern in ("stripes", "checks"):
        shift = rng.choice((-1, 1)) * rng.randint(14, 30)
        second = (_clip(first[0] + shift), _clip(first[1] + shift), _clip(first[2] + shift))
    else:
        second = _near(rng, rng.choice(GROUND_COLORS[rng.choice(list(GROUND_COLORS))]))
    return Ground(pattern, first, second, rng.randrange(1 << 16)), None


def read_cutout(path: Path) -> Cutout:
    """A picture of a package.

    Raises:
        DataError: it is no whole PNG.
    """
    try:
        return load_cutout(path)
    except ImageFault as error:
        raise DataError(f"{path}: {error}; fetch the package again") from error


def _near(rng: random.Random, color: Rgb) -> Rgb:
    return (
        _clip(color[0] + rng.randint(-8, 8)),
        _clip(color[1] + rng.randint(-8, 8)),
        _clip(color[2] + rng.randint(-8, 8)),
    )


def _clip(value: int) -> int:
    return min(255, max(0, value))
