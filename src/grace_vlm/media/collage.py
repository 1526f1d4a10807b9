"""Pictures put together from other pictures: a square ground with cut-outs pasted at any size, angle and place.

Where ``canvas`` draws marks of exact colours, this one pastes antialiased art, and so it is encoded as JPEG. The same
calls give the same bytes, for one installed Pillow.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from grace_vlm.media.canvas import Rgb
from grace_vlm.media.header import ImageFault

Cutout = Image.Image
"""A picture with its transparency, RGBA."""
PATTERNS = ("plain", "gradient", "stripes", "checks", "noise")
JPEG_QUALITY = 88
MAX_CUTOUT_PX = 4096
_NOISE_CELLS = 24


@dataclass(frozen=True)
class Ground:
    """What is behind everything: a pattern of ``PATTERNS`` from ``first`` to ``second``; ``seed`` for its noise."""

    pattern: str
    first: Rgb
    second: Rgb
    seed: int = 0


@dataclass(frozen=True)
class Pasted:
    """How a cut-out is put down: the middle and the longer side in pixels, degrees counter-clockwise."""

    center: tuple[float, float]
    side_px: int
    angle: float = 0.0
    is_mirrored: bool = False


class Collage:
    """A square RGB picture under construction."""

    def __init__(self, side_px: int, ground: Ground) -> None:
        self._image = _ground(side_px, ground)

    def paste(self, cutout: Image.Image, how: Pasted) -> None:
        """Put an RGBA picture down, scaled so that its longer side is ``how.side_px``."""
        scale = how.side_px / max(cutout.size)
        size = (max(1, round(cutout.width * scale)), max(1, round(cutout.height * scale)))
        shown = cutout.resize(size, Image.Resampling.BICUBIC)
        if how.is_mirrored:
            shown = ImageOps.mirror(shown)
        if how.angle:
            shown = shown.rotate(how.angle, Image.Resampling.BICUBIC, expand=True)
        left, top = round(how.center[0] - shown.width / 2), round(how.center[1] - shown.height / 2)
        self._image.paste(shown, (left, top), shown)

    def jpeg(self) -> bytes:
        """The picture as JPEG bytes, colours at full resolution."""
        buffer = io.BytesIO()
        self._image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
        return buffer.getvalue()


@lru_cache(maxsize=4096)
def load_cutout(path: Path) -> Image.Image:
    """A small PNG with its transparency, as RGBA.

    Raises:
        ImageFault: the file is no whole PNG, or has a side of more than 4,096 pixels.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if max(image.size) > MAX_CUTOUT_PX:
                raise ImageFault("image_too_large", f"a side has more than {MAX_CUTOUT_PX} pixels")
            return image.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageFault("image_not_an_image", "the file is no whole PNG") from error


def gray_cutout(values: bytes, side_px: int, ink: Rgb) -> Image.Image:
    """A square of ``side_px`` x ``side_px`` coverage values (0: clear, 255: ``ink``), row by row."""
    alpha = Image.frombytes("L", (side_px, side_px), values)
    cutout = Image.new("RGBA", alpha.size, (*ink, 255))
    cutout.putalpha(alpha)
    return cutout


def _ground(side_px: int, ground: Ground) -> Image.Image:
    image = Image.new("RGB", (side_px, side_px), ground.first)
    draw = ImageDraw.Draw(image)
    if ground.pattern == "gradient":
        ramp = Image.linear_gradient("L").resize((side_px, side_px))
        second = Image.new("RGB", image.size, ground.second)
        return Image.composite(second, image, ramp.transpose(Image.Transpose.ROTATE_90) if ground.seed % 2 else ramp)
    if ground.pattern == "stripes":
        step = 12 + ground.seed % 3 * 6
        for left in range(0, side_px, 2 * step):
            box = (left, 0, left + step - 1, side_px) if ground.seed % 2 else (0, left, side_px, left + step - 1)
            draw.rectangle(box, fill=ground.second)
    elif ground.pattern == "checks":
        step = 16 + ground.seed % 2 * 8
        for row in range(0, side_px, step):
            for column in range(row // step % 2 * step, side_px, 2 * step):
                draw.rectangle((column, row, column + step - 1, row + step - 1), fill=ground.second)
    elif ground.pattern == "noise":
        cells = random.Random(ground.seed).randbytes(_NOISE_CELLS * _NOISE_CELLS)
        mask = Image.frombytes("L", (_NOISE_CELLS, _NOISE_CELLS), cells)
        second = Image.new("RGB", image.size, ground.second)
        return Image.composite(second, image, mask.resize((side_px, side_px), Image.Resampling.BICUBIC))
    return image
