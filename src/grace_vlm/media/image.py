"""A stranger's picture becomes upright RGB pixels here, under limits, and nowhere else.

The order matters: file size, then container (``header.py``: format by content, size, completeness), then the limits,
and only then a decoder. Pillow gets exactly the format that the bytes claim; ``LOAD_TRUNCATED_IMAGES`` is never set.
What is merely unusual is converted, and the conversion is reported so that it can be counted; what is wrong raises
``ImageFault`` with a kind of ``IMAGE_KINDS`` and a reason in our own words (Pillow's messages carry addresses).

Deviations from Pillow's ``convert("RGB")``: transparent pixels are composited on white, not on whatever colour they
hide, and 16-bit gray keeps its high byte, where Pillow clips at 255. Colour profiles are not applied. An EXIF block
that cannot be read counts as none.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from grace_vlm.media.header import Header, ImageFault, read_header

__all__ = ["CONVERSIONS", "IMAGE_KINDS", "ImageFault", "ImageLimits", "LoadedImage", "decode_image", "load_image"]

IMAGE_KINDS = {
    "image_missing": "the picture does not exist or may not be opened",
    "image_not_a_file": "a directory or a device stands where a picture is expected",
    "image_empty": "the file has no bytes",
    "image_not_an_image": "the bytes are no JPEG, PNG, WEBP or GIF, whatever the name says",
    "image_truncated": "the bytes end early or do not decode",
    "image_too_large": "more pixels, or a larger file, than the limits allow",
    "image_too_small": "a side is shorter than the limits allow",
    "image_too_narrow": "the aspect ratio is beyond the limits",
}

CONVERSIONS = ("cmyk", "palette", "alpha", "sixteen_bit", "exif_rotation", "animation")
"""What is converted and counted: each name says what the picture was before."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Everything that Pillow's readers were seen to raise on damaged bytes; MemoryError is not among them on purpose.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost. At the limit is allowed, beyond it is a fault."""

    max_pixels: int = 64_000_000
    min_side: int = 8
    max_aspect: int = 200
    max_file_bytes: int = 134_217_728


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class LoadedImage:
    """Upright RGB pixels, and what had to be converted to get them (names of ``CONVERSIONS``, in that order)."""

    image: Image.Image
    conversions: tuple[str, ...] = ()


ImageSource = str | Path | bytes | Image.Image
"""A file's path, a file's bytes, or Pillow's own."""


def take_image(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> LoadedImage:
    """A picture from wherever a caller has it: a file's path, a file's bytes, or Pillow's.

    Raises:
        ImageFault: with a kind of ``IMAGE_KINDS``.
    """
    if isinstance(source, bytes):
        return decode_image(source, limits)
    if not isinstance(source, Image.Image):
        return load_image(Path(source), limits)
    _check_limits(*source.size, limits)
    return LoadedImage(_upright(source, _read_orientation(source)))


def load_image(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> LoadedImage:
    """Read and decode one file.

    Raises:
        ImageFault: with a kind of ``IMAGE_KINDS``.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ImageFault("image_not_a_file", f"the path is {what}")
        if status.st_size > limits.max_file_bytes:
            raise ImageFault("image_too_large", f"{status.st_size} bytes; at most {limits.max_file_bytes} are allowed")
        with path.open("rb") as file:
            data = file.read(limits.max_file_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise ImageFault("image_missing", "the file may not be opened") from None
        raise ImageFault("image_missing", "no such file") from None
    return decode_image(data, limits)


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> LoadedImage:
    """Decode one picture's bytes.

    Raises:
        ImageFault: with a kind of ``IMAGE_KINDS``.
    """
    if len(data) > limits.max_file_bytes:
        raise ImageFault("image_too_large", f"{len(data)} bytes; at most {limits.max_file_bytes} are allowed")
    header = read_header(data)
    _check_limits(header.width, header.height, limits)
    try:
        with Image.open(io.BytesIO(data), formats=[header.format]) as image:
            _check_limits(*image.size, limits)
            orientation = _read_orientation(image)
            found = _find_conversions(image, header, orientation)
            image.load()
            upright = _upright(image, orientation)
    except _DECODER_ERRORS:
        raise ImageFault("image_truncated", f"the {header.format} data is damaged and does not decode") from None
    return LoadedImage(upright, tuple(name for name in CONVERSIONS if name in found))


def _check_limits(width: int, height: int, limits: ImageLimits) -> None:
    size = f"{width} x {height} pixels"
    if width * height > limits.max_pixels:
        raise ImageFault("image_too_large", f"{size}; at most {limits.max_pixels} in all are allowed")
    if min(width, height) < limits.min_side:
        raise ImageFault("image_too_small", f"{size}; each side must be at least {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageFault("image_too_narrow", f"{size}; one side may be at most {limits.max_aspect} times the other")


def _read_orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DECODER_ERRORS:
        return 1


def _find_conversions(image: Image.Image, header: Header, orientation: int) -> set[str]:
    facts = {
        "cmyk": image.mode in ("CMYK", "YCCK"),
        "palette": image.mode in ("P", "PA"),
        "alpha": image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info,
        "sixteen_bit": header.num_bits == 16,
        "exif_rotation": orientation in _UPRIGHT,
        "animation": getattr(image, "is_animated", False) and header.format != "JPEG",
    }
    return {name for name, is_so in facts.items() if is_so}


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    rgb = _to_rgb(image)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """One decoded frame as RGB, transparency composited on white."""
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.uint32)
        hidden = gray == image.info.get("transparency", -1)
        return Image.fromarray(np.where(hidden, 255, gray >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return image.convert("RGB")
