"""Small pictures for pages: sizes, pixels that need no shrinking, and bytes that are no picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from grace_vlm.media.image import ImageFault
from grace_vlm.media.thumbnail import LARGEST_SIDE, thumbnail


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_small_picture_keeps_its_pixels() -> None:
    assert opened(thumbnail(png(100, 60))).tobytes() == opened(png(100, 60)).tobytes()


def test_a_large_one_keeps_its_shape() -> None:
    assert opened(thumbnail(png(1000, 500))).size == (LARGEST_SIDE, LARGEST_SIDE // 2)
    assert opened(thumbnail(png(64, 640), largest_side=100)).size == (10, 100)


def test_bytes_that_are_no_picture() -> None:
    with pytest.raises(ImageFault):
        thumbnail(b"no picture")
