"""A chart as a file of its own: it carries its colours, for light and for dark pages.

Charts name classes and no colours (charts.py); here are the colours of ``report.html.jinja`` for a picture without a
page around it. Without variables, which some viewers of images do not know.
"""

from __future__ import annotations

from collections.abc import Sequence

from grace_vlm.evals.charts import element

LIGHT = ("#ffffff", "#5d616a", "#e6e4df",
         "#3f60aa", "#565c66", "#b9501a", "#8d6c00", "#ad2c48", "#0b746e", "#74399b", "#3a751f")  # fmt: skip
DARK = ("#15171b", "#a3a7b0", "#272a30",
        "#8aa8f0", "#b3b9c4", "#f0925a", "#dcb744", "#f2859a", "#55c8be", "#c59bec", "#93d070")  # fmt: skip
"""Paper, text, grid, then the eight classes of marks: those of the report (evals/report.html.jinja)."""


def colors(palette: Sequence[str]) -> str:
    """Stylesheet of a palette: paper, text, grid, axes, lines and marks."""
    paper, text, grid, *classes = palette
    rules = [f".paper {{ fill: {paper}; }}", f"text {{ fill: {text}; }}", f".grid {{ stroke: {grid}; }}"]
    rules += [f".axis, .tick, .line {{ stroke: {text}; }}", f".mark {{ stroke: {paper}; }}"]
    for index, color in enumerate(classes):
        rules.append(f".line.c{index} {{ stroke: {color}; }} .mark.c{index} {{ fill: {color}; }}")
        rules.append(f".mark.ring.c{index} {{ fill: {paper}; stroke: {color}; }}")
    return "\n".join(rules)


def svg_file(width: float, height: float, style: str, children: Sequence[str], dark_style: str = "") -> str:
    """An SVG file's text: ``children`` on paper, in both palettes.

    ``style``: rules beside those of ``colors``, which come after them; ``dark_style``: more of them for dark pages.
    """
    size = {"width": width, "height": height, "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    paper = element("rect", width=width, height=height, class_="paper")
    dark = f"@media (prefers-color-scheme: dark) {{\n{colors(DARK)}\n{dark_style}}}"
    sheet = element("style", f"{style}{colors(LIGHT)}\n{dark}\n")
    return str(element("svg", sheet, paper, *children, xmlns="http://www.w3.org/2000/svg", **size)) + "\n"
