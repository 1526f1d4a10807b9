"""Pages that stand alone: styles and pictures inside, no script, nothing that a browser would load.

Every value is escaped unless it is ``Markup``; a name that a template does not get is an error. Same values, same
bytes.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_page(template: str, **values: object) -> bytes:
    """A page in UTF-8. ``template``: its path below this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(values).encode("utf-8", errors="replace")
