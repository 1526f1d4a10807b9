"""What a picture's bytes say before any decoder runs: format, size, depth, and that they all are there.

Decoders learn the size too late (WebP allocates its canvas while opening), and what they notice of damage depends on
their version: Pillow 13 refuses every cut JPEG, but reads a PNG without its last chunk, or with a wrong checksum,
without complaint. So the container is walked here, in plain Python, without touching pixels:

=====  ==========================  ==================================================
format begins with                 is complete when
=====  ==========================  ==================================================
JPEG   FF D8 FF                    a walk over its segments reaches the marker EOI (FF D9); inside entropy-coded data
                                   every FF is followed by 00 or a restart marker, so EOI cannot occur there
PNG    89 50 4E 47 0D 0A 1A 0A     a walk over its chunks reaches IEND; the checksum of each critical chunk is right,
                                   which Pillow does not look at in pixel data
WEBP   RIFF....WEBP                the bytes that RIFF announces are there
GIF    GIF87a, GIF89a              the sub-blocks of the first frame end with a block of length 0
=====  ==========================  ==================================================
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

_SIGNATURES = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF", "GIF": b"GIF8"}
FORMATS = tuple(_SIGNATURES)
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class ImageFault(Exception):
    """One picture that cannot be used: a ``kind`` of ``image.IMAGE_KINDS`` and a reason in our own words."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """Format (Pillow's name), size in pixels as stored (before EXIF rotation), bits of one sample of one channel."""

    format: str
    width: int
    height: int
    num_bits: int = 8


def read_header(data: bytes) -> Header:
    """The header of a whole picture.

    Raises:
        ImageFault: ``image_empty``, ``image_not_an_image``, or ``image_truncated`` when the bytes end early.
    """
    if not data:
        raise ImageFault("image_empty", "the file has 0 bytes")
    for name, signature in _SIGNATURES.items():
        if data.startswith(signature) or signature.startswith(data):
            header = _READERS[name](data)
            if header is None:
                raise ImageFault("image_truncated", f"the {name} data ends early, after {len(data)} bytes")
            return header
    raise ImageFault("image_not_an_image", f"the file is none of {', '.join(FORMATS)}")


def _read_jpeg(data: bytes) -> Header | None:
    header: Header | None = None
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        code = data[at + 1]
        if code == 0xD9:
            return header
        if code == 0xFF:
            at += 1
        elif code in _JPEG_BARE_MARKERS or code == 0:
            at += 2
        else:
            if code in _JPEG_FRAMES:
                header = Header("JPEG", _big(data, at + 7, 2), _big(data, at + 5, 2), _big(data, at + 4, 1))
            at += 2 + _big(data, at + 2, 2)
            if code == 0xDA:
                marker = _MARKER_AFTER_SCAN.search(data, at)
                if marker is None:
                    return None
                at = marker.start()
    return None


def _read_png(data: bytes) -> Header | None:
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + _big(data, at, 4)
        name = data[at + 4 : at + 8]
        if end > len(data):
            return None
        if name[:1].isupper() and zlib.crc32(memoryview(data)[at + 4 : end - 4]) != _big(data, end - 4, 4):
            raise ImageFault("image_truncated", "the PNG data is damaged: the checksum of a chunk is wrong")
        if name == b"IEND":
            return Header("PNG", _big(data, 16, 4), _big(data, 20, 4), data[24])
        at = end
    return None


def _read_webp(data: bytes) -> Header | None:
    if len(data) < 30 or len(data) < 8 + _little(data, 4, 4):
        return None
    if data[8:12] != b"WEBP":
        raise ImageFault("image_not_an_image", f"the file is none of {', '.join(FORMATS)}")
    chunk = data[12:16]
    if chunk == b"VP8X":
        return Header("WEBP", 1 + _little(data, 24, 3), 1 + _little(data, 27, 3))
    if chunk == b"VP8L":
        bits = _little(data, 21, 4)
        return Header("WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    return Header("WEBP", _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF)


def _read_gif(data: bytes) -> Header | None:
    if len(data) < 13:
        return None
    header = Header("GIF", _little(data, 6, 2), _little(data, 8, 2))
    at = 13 + _gif_color_table_bytes(data[10])
    while at + 10 < len(data) and data[at] in (0x21, 0x2C):
        is_frame = data[at] == 0x2C
        at += 11 + _gif_color_table_bytes(data[at + 9]) if is_frame else 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        if is_frame:
            return header if at < len(data) else None
        at += 1
    return None


def _gif_color_table_bytes(flags: int) -> int:
    return 3 << (1 + (flags & 7)) if flags & 0x80 else 0


def _big(data: bytes, at: int, num_bytes: int) -> int:
    return int.from_bytes(data[at : at + num_bytes], "big")


def _little(data: bytes, at: int, num_bytes: int) -> int:
    return int.from_bytes(data[at : at + num_bytes], "little")


_READERS = {"JPEG": _read_jpeg, "PNG": _read_png, "WEBP": _read_webp, "GIF": _read_gif}
