"""Which Pillow draws: its rasteriser, font and encoders are a part of every picture's bytes."""

from __future__ import annotations

import PIL


def pillow_version() -> str:
    """Of the installed Pillow, as text."""
    return PIL.__version__
