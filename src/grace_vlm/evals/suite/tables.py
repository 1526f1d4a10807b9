"""The card's table of several evaluations: a model a row, a benchmark a column, each number with its half interval.

Numbers of one profile stand together, and the profile is said. The best of each column is bold; a reference (a teacher)
is not compared. ``markdown``, ``latex``, ``csv`` and ``html``.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.errors import ConfigError
from grace_vlm.evals.tasks.registry import TASKS

FORMATS = ("markdown", "latex", "csv", "html")
_HALF = "± half of the 95 % interval"


@dataclass(frozen=True)
class Cell:
    """A headline number and half of its interval, in points."""

    value: float
    half: float
    num_scored: int
    num_total: int


@dataclass(frozen=True)
class Line:
    """A model's row. ``is_reference``: shown first, never bold."""

    label: str
    cells: dict[str, Cell]
    is_reference: bool = False


def read_line(folder: Path, label: str, profile: str, is_reference: bool = False) -> Line:
    """Of an evaluation's ``scores.json``.

    Raises:
        ConfigError: there is none, or none of the profile.
    """
    if (folder / "run.json").is_file() and not (folder / "scores.json").is_file():
        raise ConfigError(f"{folder} has answers and no scores yet; end it with grace eval --suite ... --resume")
    try:
        content: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        scores = content["scores"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} has no readable scores.json ({error}); run grace eval --suite first") from None
    if profile not in scores:
        known = ", ".join(scores)
        raise ConfigError(f"{folder} has scores of {known}; for {profile} run grace eval with --profile {profile}")
    cells = {name: _cell(report) for name, report in scores[profile].items()}
    return Line(label, cells, is_reference)


def _cell(report: dict[str, Any]) -> Cell:
    metric = report["metrics"][report["headline"]]
    scale = 100.0 if metric["upper"] == 1.0 else 1.0
    half = scale * (metric["high"] - metric["low"]) / 2
    return Cell(scale * metric["value"], half, metric["num_scored"], metric["num_total"])


def table(lines: Sequence[Line], profile: str, form: str) -> str:
    """All rows, references first.

    Raises:
        ConfigError: no such format.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format is {form}; expected one of {', '.join(FORMATS)}")
    ordered = sorted(lines, key=lambda line: not line.is_reference)
    names = [name for name in TASKS if any(name in line.cells for line in lines)]
    if form == "csv":
        return _csv(ordered, names, profile)
    best = {name: _best(ordered, name) for name in names}
    written: dict[str, Callable[[str], str]] = {"latex": _escaped, "html": html.escape, "markdown": str}
    rows = [[written[form](line.label), *(_text(line, name, best[name], form) for name in names)] for line in ordered]
    heads = ["model", *(TASKS[name].about.title for name in names)]
    return {"markdown": _markdown, "latex": _latex, "html": _html}[form](heads, rows, f"profile {profile}; {_HALF}")


def _markdown(heads: list[str], rows: list[list[str]], said: str) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join([*lines, "", said, ""])


def _latex(heads: list[str], rows: list[list[str]], said: str) -> str:
    head = " & ".join(_escaped(text) for text in heads)
    body = " \\\\\n".join(" & ".join(row) for row in rows)
    columns = "l" + "r" * (len(heads) - 1)
    return f"\\begin{{tabular}}{{{columns}}}\n{head} \\\\\n\\hline\n{body} \\\\\n\\end{{tabular}}\n% {said}\n"


def _html(heads: list[str], rows: list[list[str]], said: str) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>\n<caption>{html.escape(said)}</caption>\n<tr>{head}</tr>\n{body}\n</table>\n"


def _best(lines: Sequence[Line], name: str) -> float | None:
    values = [line.cells[name].value for line in lines if name in line.cells and not line.is_reference]
    return max(values) if len(values) > 1 else None


def _text(line: Line, name: str, best: float | None, form: str) -> str:
    if name not in line.cells:
        return ""
    cell = line.cells[name]
    value, half = f"{cell.value:.1f}", f"{cell.half:.1f}"
    is_best = not line.is_reference and best is not None and value == f"{best:.1f}"
    if form == "latex":
        return (f"\\textbf{{{value}}}" if is_best else value) + f" {{\\small $\\pm$ {half}}}"
    if form == "html":
        return (f"<b>{value}</b>" if is_best else value) + f" <small>± {half}</small>"
    return (f"**{value}**" if is_best else value) + f" ± {half}"


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "&%$#_{}" else char for char in text)


def _csv(lines: Sequence[Line], names: Sequence[str], profile: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "task", "profile", "value", "half_interval", "num_scored", "num_total"])
    for line in lines:
        for name in names:
            if name in line.cells:
                cell = line.cells[name]
                numbers = [f"{cell.value:.4f}", f"{cell.half:.4f}", cell.num_scored, cell.num_total]
                writer.writerow([line.label, name, profile, *numbers])
    return out.getvalue()
