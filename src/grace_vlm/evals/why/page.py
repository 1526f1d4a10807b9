"""``index.html``: the pictures of an analysis with what each says, in one file that loads nothing.

Names of models and rows are strangers' text; Jinja escapes them. The same ``analysis.json`` gives the same page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from grace_vlm.checkpoint.atomic import write_bytes_atomic
from grace_vlm.evals.plain_page import render_page
from grace_vlm.evals.why.pictures import pictures_of

PAGE = "index.html"


def write_pictures(out: Path, result: Mapping[str, Any]) -> list[Path]:
    """Every picture and ``index.html``, made of the content of ``analysis.json``; their paths, the page last."""
    pictures = pictures_of(result)
    for stale in out.glob("*.svg"):  # of an analysis that had models which this one lacks
        if stale.name not in pictures:
            stale.unlink()
    written = [out / name for name in pictures]
    for path, text in zip(written, pictures.values(), strict=True):
        write_bytes_atomic(path, text.encode("utf-8"))
    shown = {name.removesuffix(".svg"): Markup(text) for name, text in pictures.items()}
    write_bytes_atomic(out / PAGE, render_page("why/page.html.jinja", result=result, pictures=shown))
    return [*written, out / PAGE]
