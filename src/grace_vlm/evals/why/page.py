"""``index.html``: the pictures of an analysis with what each says, in one file that loads nothing.

Names of models and rows are strangers' text; Jinja escapes them. The same ``analysis.json`` gives the same page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grace_vlm.checkpoint.atomic import write_bytes_atomic
from grace_vlm.evals.why.pictures import pictures_of

PAGE = "index.html"


def write_pictures(out: Path, result: Mapping[str, Any]) -> list[Path]:
    """Every picture and ``index.html``, made of the content of ``analysis.json``; their paths, the page last."""
    pictures = pictures_of(result)
    written = [out / name for name in pictures]
    for path, text in zip(written, pictures.values(), strict=True):
        write_bytes_atomic(path, text.encode("utf-8"))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = {name.removesuffix(".svg"): Markup(text) for name, text in pictures.items()}
    page = environment.get_template("page.html.jinja").render(result=result, pictures=shown)
    write_bytes_atomic(out / PAGE, page.encode("utf-8", errors="replace"))
    return [*written, out / PAGE]
