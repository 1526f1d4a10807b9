"""Marks are where and what they claim to be, and the same calls give the same bytes."""

from __future__ import annotations

import io
import math

import pytest
from PIL import Image

from grace_vlm.media.canvas import COLORS, SHAPES, Canvas

PAPER = (250, 250, 250)


def pixels(canvas: Canvas) -> Image.Image:
    return Image.open(io.BytesIO(canvas.png()))


def area_px(image: Image.Image, rgb: tuple[int, int, int]) -> int:
    return sum(count for count, color in image.getcolors(1 << 16) if color == rgb)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_fills_its_area_inside_its_circle(name: str) -> None:
    canvas, radius = Canvas(128, PAPER), 50
    canvas.shape(name, (64, 64), radius, COLORS["red"])
    image = pixels(canvas)
    expected = {
        "circle": math.pi,
        "rectangle": 4 * 0.62,
        "cross": 4 * (2 * 0.3) - (2 * 0.3) ** 2,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 10 * 0.5 * 0.42 * math.sin(math.pi / 5),
    }[name]
    assert area_px(image, COLORS["red"]) == pytest.approx(expected * radius**2, rel=0.04)
    assert area_px(image, COLORS["red"]) + area_px(image, PAPER) == 128 * 128  # nothing antialiased
    left, top, right, bottom = image.point(lambda value: 255 if value < 100 else 0).getbbox()
    assert min(left, top) >= 13
    assert max(right, bottom) <= 116


def test_the_head_of_an_arrow_is_at_its_end() -> None:
    canvas = Canvas(64, PAPER)
    canvas.arrow((10, 32), (50, 32), (0, 0, 0))
    image = pixels(canvas)
    dark = [sum(image.getpixel((x, y)) == (0, 0, 0) for y in range(64)) for x in range(64)]
    assert dark[20] == 2  # the line
    assert max(range(64), key=lambda x: dark[x]) in range(40, 46)  # the wings
    assert dark[50] >= 1
    assert sum(dark[52:]) == 0


def test_the_same_calls_give_the_same_bytes() -> None:
    def make() -> bytes:
        canvas = Canvas(48, PAPER)
        canvas.text((24, 24), "8", 30, (0, 0, 0))
        canvas.line((0, 0), (47, 10), (1, 2, 3))
        return canvas.png()

    assert make() == make()
