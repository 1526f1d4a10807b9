"""Cut-outs land where they are put, grounds are what they are called, and a damaged picture is a fault."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grace_vlm.media.canvas import Canvas, text_width
from grace_vlm.media.collage import PATTERNS, Collage, Ground, Pasted, gray_cutout, load_cutout
from grace_vlm.media.header import ImageFault

WHITE, RED, BLUE = (255, 255, 255), (220, 30, 30), (30, 30, 220)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def near(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(image - np.array(color)).max(-1) < 40


def test_a_cutout_has_its_size_place_and_clear_parts() -> None:
    cutout = Image.new("RGBA", (32, 16), (*RED, 255))
    cutout.paste((*BLUE, 0), (0, 0, 16, 16))  # the left half is clear
    collage = Collage(128, Ground("plain", WHITE, WHITE))
    collage.paste(cutout, Pasted((64, 40), 64))
    rows, columns = np.nonzero(near(pixels(collage.jpeg()), RED))
    assert abs(rows.min() - 24) <= 1
    assert abs(rows.max() - 55) <= 1
    assert abs(columns.min() - 64) <= 2
    assert abs(columns.max() - 95) <= 1
    mirrored = Collage(128, Ground("plain", WHITE, WHITE))
    mirrored.paste(cutout, Pasted((64, 40), 64, is_mirrored=True))
    assert np.nonzero(near(pixels(mirrored.jpeg()), RED))[1].max() <= 65
    turned = Collage(128, Ground("plain", WHITE, WHITE))
    turned.paste(cutout, Pasted((64, 64), 64, angle=90.0))
    rows, columns = np.nonzero(near(pixels(turned.jpeg()), RED))
    assert rows.max() - rows.min() == pytest.approx(31, abs=2)
    assert rows.max() <= 66  # counter-clockwise: what was right is up


def test_grounds_have_their_two_colours_and_the_same_bytes_again() -> None:
    seen = set()
    for pattern in PATTERNS:
        for seed in (0, 1):
            ground = Ground(pattern, RED, BLUE, seed)
            data = Collage(96, ground).jpeg()
            assert data == Collage(96, ground).jpeg()
            image = pixels(data)
            assert near(image, RED).any()
            assert near(image, BLUE).any() == (pattern != "plain")
            seen.add(data)
    assert len(seen) == 2 * len(PATTERNS) - 1  # a seed changes all but the plain one


def test_coverage_becomes_ink() -> None:
    cutout = gray_cutout(bytes([0, 255, 128, 0]), 2, BLUE)
    assert [cutout.getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [(*BLUE, 0), (*BLUE, 255), (*BLUE, 128)]


def test_a_file_that_is_no_png_is_a_fault(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (*RED, 255)).save(tmp_path / "good.png")
    assert load_cutout(tmp_path / "good.png").getpixel((3, 3)) == (*RED, 255)
    whole = (tmp_path / "good.png").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "jpeg.png", "JPEG")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (5000, 1)).save(tmp_path / "wide.png")
    for name in ("jpeg", "cut", "wide", "none"):
        with pytest.raises(ImageFault) as caught:
            load_cutout(tmp_path / f"{name}.png")
        assert caught.value.kind == ("image_too_large" if name == "wide" else "image_not_an_image")


def test_a_canvas_has_slices_and_texts_that_begin_or_end_somewhere() -> None:
    canvas = Canvas(100, WHITE)
    canvas.slice((50, 50), 40, 0.0, 0.25, RED)
    image = pixels(canvas.png())
    rows, columns = np.nonzero(near(image, RED))
    assert (rows.max(), columns.min()) == (50, 50)  # the first quarter: above and right
    assert len(rows) == pytest.approx(np.pi * 40**2 / 4, rel=0.06)
    for anchor, first, last in (("lm", 50, 88), ("rm", 12, 50), ("mm", 31, 69)):
        canvas = Canvas(100, WHITE)
        canvas.text((50, 50), "WWW", 14, (0, 0, 0), anchor)
        columns = np.nonzero(pixels(canvas.png()).sum(-1) < 300)[1]
        assert columns.min() == pytest.approx(first, abs=4), anchor
        assert columns.max() == pytest.approx(last, abs=4), anchor
        assert columns.max() - columns.min() == pytest.approx(text_width("WWW", 14), abs=3)
