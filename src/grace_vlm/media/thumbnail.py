"""A picture as a page shows it: small, upright, in bytes of our own making, whatever a stranger's were."""

from __future__ import annotations

import io

from grace_vlm.media.image import take_image

LARGEST_SIDE = 320


def thumbnail(data: bytes, largest_side: int = LARGEST_SIDE) -> bytes:
    """PNG bytes of a picture, shrunk until neither side is above ``largest_side``; a smaller one keeps its size.

    Raises:
        ImageFault: bytes that are no picture within the limits.
    """
    image = take_image(data).image
    if max(image.size) > largest_side:
        image = image.copy()
        image.thumbnail((largest_side, largest_side))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
