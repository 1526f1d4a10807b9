"""Strangers' bytes: everything unusual is converted and reported, everything wrong is one of the closed kinds."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from grace_vlm.media.image import (
    CONVERSIONS,
    IMAGE_KINDS,
    ImageFault,
    ImageLimits,
    decode_image,
    load_image,
    take_image,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure in every block."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG whose header claims a size; its pixel data is far too short."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def sixteen_bit_png(gray: np.ndarray) -> bytes:
    return encode(Image.fromarray(gray.astype(np.uint16)), "PNG")


def sixteen_bit_rgb_png(rgb: np.ndarray) -> bytes:
    height, width, _ = rgb.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in rgb)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def verdict_on(data: bytes) -> str:
    """``kind: reason``, empty for a good picture; any other exception than ours is an error."""
    try:
        decode_image(data)
    except ImageFault as fault:
        return str(fault)
    return ""


def fault_of(data: bytes, limits: ImageLimits | None = None) -> tuple[str, str]:
    with pytest.raises(ImageFault) as caught:
        decode_image(data, limits or ImageLimits())
    assert caught.value.kind in IMAGE_KINDS
    return caught.value.kind, caught.value.reason


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_jpeg_cut_at_each_percent_is_found(seed: int, options: dict[str, bool]) -> None:
    whole = encode(smooth(64 + 8 * seed, 56, seed), "JPEG", quality=60 + 3 * seed, **options)
    assert decode_image(whole).image.size == (64 + 8 * seed, 56)
    for percent in range(1, 100):
        num_bytes = len(whole) * percent // 100
        kind, reason = fault_of(whole[:num_bytes])
        assert (kind, reason) == ("image_truncated", f"the JPEG data ends early, after {num_bytes} bytes")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_cut_at_every_single_byte_is_found(file_format: str) -> None:
    whole = encode(smooth(24, 24), file_format)
    assert {fault_of(whole[:end])[0] for end in range(1, len(whole))} == {"image_truncated"}
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_tails_are_missed_by_pillow_and_found_here() -> None:
    whole = encode(smooth(32, 32), "PNG")
    for data in (whole[:-12], whole[:-1]):
        Image.open(io.BytesIO(data)).load()  # no error: this is why we walk the container
        assert fault_of(data)[0] == "image_truncated"


def test_bytes_after_the_end_are_allowed() -> None:
    image = smooth(32, 32)
    for file_format in ("JPEG", "PNG", "WEBP"):
        data = encode(image, file_format)
        assert decode_image(data + b"trailer").image.tobytes() == decode_image(data).image.tobytes()


def test_flipped_bits_never_crash_and_a_png_notices_each() -> None:
    draw = random.Random(0)
    for file_format in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = encode(smooth(40, 40), file_format)
        for _ in range(300):
            at, bit = draw.randrange(min(len(whole), 4096)), draw.randrange(8)
            data = bytearray(whole)
            data[at] ^= 1 << bit
            start_seconds = time.perf_counter()
            verdict = verdict_on(bytes(data))
            assert time.perf_counter() - start_seconds < 1.0
            assert "0x" not in verdict
            assert verdict or file_format != "PNG", f"bit {bit} of byte {at} went unnoticed"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP", b"GIF89a"]), st.binary())
def test_noise_is_refused_in_our_own_words(signature: bytes, noise: bytes) -> None:
    kind, _, reason = verdict_on(signature + noise).partition(": ")
    assert kind in IMAGE_KINDS
    assert reason


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"", "image_empty", "the file has 0 bytes"),
        (b"<!DOCTYPE html><html>404</html>", "image_not_an_image", "the file is none of JPEG, PNG, WEBP, GIF"),
        (b"RIFF\x04\0\0\0WAVE" + bytes(40), "image_not_an_image", "the file is none of JPEG, PNG, WEBP, GIF"),
        (png_claiming(8000, 8001), "image_too_large", "8000 x 8001 pixels; at most 64000000 in all are allowed"),
        (png_claiming(0, 8), "image_too_small", "0 x 8 pixels; each side must be at least 8"),
        (png_claiming(7, 90), "image_too_small", "7 x 90 pixels; each side must be at least 8"),
        (png_claiming(8, 1601), "image_too_narrow", "8 x 1601 pixels; one side may be at most 200 times the other"),
        (png_claiming(64, 64), "image_truncated", "the PNG data is damaged and does not decode"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("image_") else "",
)
def test_what_is_wrong_is_named(data: bytes, kind: str, reason: str) -> None:
    assert fault_of(data) == (kind, reason)


def test_at_the_limits_is_allowed() -> None:
    for size in ((8, 8), (8, 1600), (1600, 8)):
        assert decode_image(encode(Image.new("RGB", size), "PNG")).image.size == size
    data = encode(Image.new("RGB", (20, 10)), "PNG")
    limits = ImageLimits(max_pixels=200, min_side=10, max_aspect=2, max_file_bytes=len(data))
    assert decode_image(data, limits).image.size == (20, 10)
    too_long = f"{len(data) + 1} bytes; at most {len(data)} are allowed"
    assert fault_of(data + b"!", limits) == ("image_too_large", too_long)


def test_a_webp_bomb_is_refused_before_its_canvas_is_allocated() -> None:
    data = bytearray(encode(smooth(16, 16), "WEBP", save_all=True, append_images=[smooth(16, 16, 1)]))
    assert data[12:16] == b"VP8X"
    data[24:30] = (16_000).to_bytes(3, "little") * 2
    assert fault_of(bytes(data)) == ("image_too_large", "16001 x 16001 pixels; at most 64000000 in all are allowed")


def test_files_that_are_none(tmp_path: Path) -> None:
    fifo, secret = tmp_path / "fifo", tmp_path / "secret.png"
    os.mkfifo(fifo)
    secret.write_bytes(encode(smooth(8, 8), "PNG"))
    cases = {
        tmp_path / "absent.png": ("image_missing", "no such file"),
        tmp_path / "nul\0.png": ("image_missing", "no such file"),
        tmp_path / ("long" * 100): ("image_missing", "no such file"),
        tmp_path: ("image_not_a_file", "the path is a directory"),
        fifo: ("image_not_a_file", "the path is no regular file"),
    }
    for path, expected in cases.items():
        with pytest.raises(ImageFault) as caught:
            load_image(path)
        assert (caught.value.kind, caught.value.reason) == expected
    with pytest.raises(ImageFault) as caught:
        load_image(secret, ImageLimits(max_file_bytes=10))
    assert caught.value.reason == f"{secret.stat().st_size} bytes; at most 10 are allowed"


def test_plain_pictures_are_not_converted() -> None:
    image = smooth(20, 12)
    assert decode_image(encode(image, "PNG")).image.tobytes() == image.tobytes()
    for data in (encode(image, "PNG"), encode(image, "JPEG"), encode(image, "WEBP"), encode(image.convert("L"), "PNG")):
        loaded = decode_image(data)
        assert (loaded.image.mode, loaded.conversions) == ("RGB", ())


def test_cmyk_and_palette() -> None:
    loaded = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert loaded.conversions == ("cmyk",)
    assert all(abs(a - b) < 12 for a, b in zip(loaded.image.getpixel((8, 8)), RED, strict=True))
    for file_format in ("PNG", "GIF"):
        loaded = decode_image(encode(Image.new("RGB", (16, 16), BLUE).convert("P"), file_format))
        assert (loaded.conversions, loaded.image.getpixel((3, 3))) == (("palette",), BLUE)


def test_transparency_is_composited_on_white() -> None:
    image = Image.new("RGBA", (16, 16), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))  # hidden black
    image.paste((*BLUE, 128), (0, 0, 8, 4))
    loaded = decode_image(encode(image, "PNG"))
    assert loaded.conversions == ("alpha",)
    assert loaded.image.getpixel((2, 10)) == WHITE
    assert loaded.image.getpixel((12, 10)) == RED
    assert loaded.image.getpixel((2, 2)) == (127, 127, 255)
    keyed = decode_image(encode(Image.new("RGB", (16, 16), RED), "PNG", transparency=RED))
    assert (keyed.conversions, keyed.image.getpixel((0, 0))) == (("alpha",), WHITE)
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([*RED, *BLUE])
    loaded = decode_image(encode(palette, "PNG", transparency=1))
    assert (loaded.conversions, loaded.image.getpixel((0, 0))) == (("palette", "alpha"), WHITE)


def test_sixteen_bits_keep_the_high_byte() -> None:
    gray = np.full((8, 8), 0x80FF)
    gray[0, 0] = 0x01FF
    loaded = decode_image(sixteen_bit_png(gray))
    assert loaded.conversions == ("sixteen_bit",)
    assert (loaded.image.getpixel((4, 4)), loaded.image.getpixel((0, 0))) == ((0x80,) * 3, (1, 1, 1))
    rgb = np.zeros((8, 8, 3), int)
    rgb[..., 0], rgb[..., 2] = 0xFF00, 0x7F80
    loaded = decode_image(sixteen_bit_rgb_png(rgb))
    assert (loaded.conversions, loaded.image.getpixel((4, 4))) == (("sixteen_bit",), (0xFF, 0, 0x7F))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(orientation: int, file_format: str) -> None:
    """The stored picture is what a camera in that orientation writes for one upright scene."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = RED, BLUE, WHITE
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, quality=100)
    loaded = decode_image(data)
    assert loaded.conversions == (("exif_rotation",) if orientation > 1 else ())
    assert np.abs(np.asarray(loaded.image).astype(int) - upright).mean() < 12


def test_an_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    for file_format, extra in (("PNG", ()), ("WEBP", ()), ("GIF", ("palette",))):
        data = encode(
            first,
            file_format,
            save_all=True,
            append_images=[second],
            **({"lossless": True} if file_format == "WEBP" else {}),
        )
        loaded = decode_image(data)
        assert loaded.conversions == (*extra, "animation")
        assert loaded.image.getpixel((8, 8)) == RED
    assert set(loaded.conversions) <= set(CONVERSIONS)


def test_broken_exif_counts_as_none() -> None:
    data = encode(smooth(16, 16), "JPEG", exif=b"Exif\0\0" + b"\xff" * 20)
    assert decode_image(data).conversions == ()


def test_pillows_own_pictures_turn_as_files_do(tmp_path: Path) -> None:
    """Orientation and transparency of an open picture are those of its file."""
    layer = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    layer.save(path, exif=exif)
    from_file, from_pillow = load_image(path).image, take_image(Image.open(path)).image
    assert from_file.size == from_pillow.size == (20, 40)
    assert from_file.tobytes() == from_pillow.tobytes() == take_image(path.read_bytes()).image.tobytes()
