"""Pictures that we draw ourselves: a square canvas with the few marks that the generated sources need.

The same calls give the same pixels, and the same pixels give the same PNG bytes, for one installed Pillow (its
rasteriser, its built-in font and its zlib are part of the picture). Coordinates are pixels from the top left corner.
Nothing is antialiased except text, so a mark has exactly the colour it was given.
"""

from __future__ import annotations

import io
import math
from functools import cache

from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, Rgb] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
"""The eight colours of easy-VQA, so that a colour word means one thing in every source."""

SHAPES = ("circle", "cross", "rectangle", "star", "triangle")


def text_width(text: str, size_px: int) -> float:
    """Of a text on a canvas, in pixels."""
    return float(_font(size_px).getlength(text))


@cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


class Canvas:
    """A square RGB picture under construction."""

    def __init__(self, side_px: int, background: Rgb) -> None:
        self._image = Image.new("RGB", (side_px, side_px), background)
        self._draw = ImageDraw.Draw(self._image)

    def shape(self, name: str, center: Point, radius: float, color: Rgb) -> None:
        """Draw one of ``SHAPES`` inside the circle of ``radius`` around ``center``."""
        x, y = center
        if name == "circle":
            self.disc(center, radius, color)
        elif name == "rectangle":
            self.box(x - radius, y - 0.62 * radius, x + radius, y + 0.62 * radius, color)
        elif name == "cross":
            arm = 0.3 * radius
            self.box(x - radius, y - arm, x + radius, y + arm, color)
            self.box(x - arm, y - radius, x + arm, y + radius, color)
        elif name == "triangle":
            self._draw.polygon([_polar(center, radius, third / 3) for third in range(3)], fill=color)
        else:
            assert name == "star", name
            radii = (radius, 0.42 * radius)
            self._draw.polygon([_polar(center, radii[tip % 2], tip / 10) for tip in range(10)], fill=color)

    def disc(self, center: Point, radius: float, color: Rgb) -> None:
        """A filled circle."""
        x, y = center
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Rgb) -> None:
        """A filled, upright rectangle."""
        self._draw.rectangle((left, top, right, bottom), fill=color)

    def line(self, start: Point, end: Point, color: Rgb, width_px: int = 1) -> None:
        """A straight line."""
        self._draw.line((*start, *end), fill=color, width=width_px)

    def arrow(self, start: Point, end: Point, color: Rgb, head_px: float = 8.0) -> None:
        """A line of 2 pixels with a filled head whose tip is at ``end``."""
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        neck = (end[0] - head_px * math.cos(angle), end[1] - head_px * math.sin(angle))
        self.line(start, neck, color, width_px=2)
        wing = (0.5 * head_px * math.sin(angle), 0.5 * head_px * math.cos(angle))
        wings = [(neck[0] + wing[0], neck[1] - wing[1]), (neck[0] - wing[0], neck[1] + wing[1])]
        self._draw.polygon([end, *wings], fill=color)

    def text(self, at: Point, text: str, size_px: int, color: Rgb, anchor: str = "mm") -> None:
        """A short text in Pillow's built-in font, its middle at ``at``, or with the anchors ``lm`` and ``rm`` that of
        its left and right end."""
        self._draw.text(at, text, font=_font(size_px), fill=color, anchor=anchor)

    def slice(self, center: Point, radius: float, start: float, end: float, color: Rgb) -> None:
        """A filled slice of a circle between two fractions of a clockwise turn that starts straight up."""
        x, y = center
        box = (x - radius, y - radius, x + radius, y + radius)
        self._draw.pieslice(box, 360 * start - 90, 360 * end - 90, fill=color)

    def paste(self, image: Image.Image, left: int, top: int) -> None:
        """Put another picture, unscaled, with its corner at (left, top)."""
        self._image.paste(image, (left, top))

    def png(self) -> bytes:
        """The picture as PNG bytes."""
        buffer = io.BytesIO()
        self._image.save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()


def _polar(center: Point, radius: float, turn: float) -> Point:
    """The point at ``turn`` of a full clockwise turn, starting straight up."""
    angle = 2 * math.pi * turn
    return center[0] + radius * math.sin(angle), center[1] - radius * math.cos(angle)
