"""The card's table of several evaluations: a model a row, a benchmark a column, each number with its interval; and the
same by category, a category a row and a model a column.

Intervals have both ends: near 0 and 100, and by Wilson's rule anywhere, they do not lie evenly about the number.
Numbers of one profile stand together, and the profile is said. The best of each column is bold, and so is all that
prints the same digits: a tie is no difference. Where models were asked different numbers of rows, none is, and fewer
rows than another's are said. A reference (a teacher) is not compared. ``markdown``, ``latex``, ``csv`` and ``html``.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_vlm.errors import ConfigError
from grace_vlm.evals.suite.categories import category_scores
from grace_vlm.evals.suite.ledger import read_identity
from grace_vlm.evals.tasks.registry import TASKS

FORMATS = ("markdown", "latex", "csv", "html")
_SAID = "[95 % interval]"


@dataclass(frozen=True)
class Cell:
    """A number and the ends of its interval, in points."""

    value: float
    low: float
    high: float
    num_scored: int
    num_total: int
    metric: str = ""


@dataclass(frozen=True)
class Line:
    """A model's row. ``is_reference``: shown first, never bold. ``categories``: (task, column, value) -> number, of the
    breakdown that was asked for."""

    label: str
    cells: dict[str, Cell]
    is_reference: bool = False
    categories: dict[tuple[str, str, str], Cell] = field(default_factory=dict)


def read_line(folder: Path, label: str, profile: str, is_reference: bool = False, by: str | None = None) -> Line:
    """Of an evaluation's ``scores.json``. ``by``: a column of the breakdown (``categories.py``). A control is said in
    its label and is a reference: it is no model's score. ``--limit`` is said there, too.

    Raises:
        ConfigError: there is none, none of the profile, or no such column.
    """
    content = read_scores(folder)
    reports, limit = reports_of(content, folder, profile), content["limit"]
    control = control_of(folder)
    label, is_reference = (label, is_reference) if control is None else (f"{label} [control: {control}]", True)
    label = label if limit is None else f"{label} [first {limit} rows]"
    cells = {name: _cell(report["metrics"][report["headline"]], report["headline"]) for name, report in reports.items()}
    found = [] if by is None else category_scores(reports, by)
    categories = {(one.task, one.column, one.value): _cell(one.metric) for one in found}
    return Line(label, cells, is_reference, categories)


def read_reports(folder: Path, profile: str) -> dict[str, dict[str, Any]]:
    """Task -> report of a profile of an evaluation's ``scores.json``.

    Raises:
        ConfigError: there is none, or none of the profile.
    """
    return reports_of(read_scores(folder), folder, profile)


def reports_of(content: Mapping[str, Any], folder: Path, profile: str) -> dict[str, dict[str, Any]]:
    """Task -> report of a profile of ``read_scores(folder)``; ``ConfigError`` if it has none of the profile."""
    scores: dict[str, dict[str, Any]] = content["scores"]
    if profile not in scores:
        known = ", ".join(scores)
        raise ConfigError(
            f"{folder} has scores of {known}; pass --profile {next(iter(scores))}, or run grace eval with --profile "
            f"{profile}"
        )
    return scores[profile]


def read_scores(folder: Path) -> dict[str, Any]:
    """An evaluation's ``scores.json``; ``ConfigError`` if there is none."""
    if (folder / "run.json").is_file() and not (folder / "scores.json").is_file():
        raise ConfigError(f"{folder} has answers and no scores yet; end it with grace eval --suite ... --resume")
    if not (folder / "scores.json").is_file():
        from grace_vlm.formats.folder import is_model  # brings torch, which a table does without

        what = "is a model" if is_model(folder) else "has no scores.json"
        what = what if folder.is_dir() else "is no folder"
        raise ConfigError(f"{folder} {what}; expected what grace eval MODEL --suite card --data DIR --out DIR wrote")
    try:
        content: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no readable scores.json ({error}); run grace eval --suite again") from None
    if not isinstance(content, dict) or not {"scores", "limit", "data"} <= content.keys():
        raise ConfigError(f"{folder / 'scores.json'} is no file of grace eval --suite; expected scores, limit and data")
    return content


def control_of(folder: Path) -> str | None:
    """The control that an evaluation is, by its ``run.json``; None where the benchmarks themselves were asked."""
    control: str | None = read_identity(folder).get("control")
    return control


def _cell(metric: Mapping[str, Any], name: str = "") -> Cell:
    scale = 100.0 if metric["upper"] == 1.0 else 1.0
    value, low, high = (scale * metric[number] for number in ("value", "low", "high"))
    return Cell(value, low, high, metric["num_scored"], metric["num_total"], name)


def table(lines: Sequence[Line], profile: str, form: str) -> str:
    """All rows, references first.

    Raises:
        ConfigError: no such format.
    """
    _check_form(form)
    ordered = sorted(lines, key=lambda line: not line.is_reference)
    names = [name for name in TASKS if any(name in line.cells for line in lines)]
    if form == "csv":
        return _csv(ordered, names, profile)
    best = {name: _best([line.cells.get(name) for line in ordered if not line.is_reference]) for name in names}
    most = {name: max(line.cells[name].num_total for line in ordered if name in line.cells) for name in names}
    rows = [
        [
            _written(line.label, form),
            *(_text(line.cells.get(name), line, best[name], form, most[name]) for name in names),
        ]
        for line in ordered
    ]
    return _whole(["model", *(_titled(name, ordered) for name in names)], rows, profile, form)


def _titled(name: str, lines: Sequence[Line]) -> str:
    """A benchmark and what is measured on it."""
    metrics = dict.fromkeys(line.cells[name].metric for line in lines if name in line.cells)
    return " ".join(filter(None, (TASKS[name].about.title, "/".join(metrics))))


def category_table(lines: Sequence[Line], profile: str, form: str) -> str:
    """Every category of ``lines``, references first: a row each, with its number of questions.

    Raises:
        ConfigError: no such format.
    """
    _check_form(form)
    ordered = sorted(lines, key=lambda line: not line.is_reference)
    keys = list(dict.fromkeys(key for line in ordered for key in line.categories))
    if form == "csv":
        return _category_csv(ordered, keys, profile)
    rows = []
    for key in keys:
        cells = [line.categories.get(key) for line in ordered]
        best = _best([cell for cell, line in zip(cells, ordered, strict=True) if not line.is_reference])
        texts = [_text(cell, line, best, form) for cell, line in zip(cells, ordered, strict=True)]
        count = next(cell.num_total for cell in cells if cell is not None)
        task, column, value = key
        heads = (TASKS[task].about.title, f"{column}: {value}", str(count))
        rows.append([*(_written(text, form) for text in heads), *texts])
    return _whole(["benchmark", "category", "n", *(line.label for line in ordered)], rows, profile, form)


def _check_form(form: str) -> None:
    if form not in FORMATS:
        raise ConfigError(f"--format is {form}; expected one of {', '.join(FORMATS)}")


def _written(text: str, form: str) -> str:
    """A stranger's text in a format's own alphabet."""
    written: dict[str, Callable[[str], str]] = {"latex": _escaped, "html": html.escape, "markdown": _piped}
    return written[form](text)


def _piped(text: str) -> str:
    return text.replace("|", "\\|")


def _whole(heads: list[str], rows: list[list[str]], profile: str, form: str) -> str:
    return _table(heads, rows, f"profile {profile}; {_SAID}", form)


def _table(heads: list[str], rows: list[list[str]], said: str, form: str) -> str:
    return {"markdown": _markdown, "latex": _latex, "html": _html}[form](heads, rows, said)


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


def _best(cells: Sequence[Cell | None]) -> float | None:
    found = [cell for cell in cells if cell is not None]
    is_fair = len(found) > 1 and len({cell.num_total for cell in found}) == 1
    return max(cell.value for cell in found) if is_fair else None


def _text(cell: Cell | None, line: Line, best: float | None, form: str, most: int = 0) -> str:
    if cell is None:
        return ""
    if not cell.num_total:
        return "-"
    fewer = f" ({cell.num_total} of {most})" if cell.num_total < most else ""
    return _number(cell, line, best, form) + fewer


def _number(cell: Cell, line: Line, best: float | None, form: str) -> str:
    value, low, high = (f"{number:.1f}" for number in (cell.value, cell.low, cell.high))
    is_best = not line.is_reference and best is not None and value == f"{best:.1f}"
    if form == "latex":
        return (f"\\textbf{{{value}}}" if is_best else value) + f" {{\\small [{low}, {high}]}}"
    if form == "html":
        return (f"<b>{value}</b>" if is_best else value) + f" <small>[{low}, {high}]</small>"
    return (f"**{value}**" if is_best else value) + f" [{low}, {high}]"


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "&%$#_{}" else char for char in text)


def _csv(lines: Sequence[Line], names: Sequence[str], profile: str) -> str:
    rows = [
        [line.label, name, profile, line.cells[name].metric, *_numbers(line.cells[name])]
        for line in lines
        for name in names
        if name in line.cells
    ]
    return _csv_text(["model", "task", "profile", "metric", *_NUMBERS], rows)


def _category_csv(lines: Sequence[Line], keys: Sequence[tuple[str, str, str]], profile: str) -> str:
    rows = [
        [line.label, *key, profile, *_numbers(line.categories[key])]
        for line in lines
        for key in keys
        if key in line.categories
    ]
    return _csv_text(["model", "task", "column", "category", "profile", *_NUMBERS], rows)


_NUMBERS = ("value", "low", "high", "num_scored", "num_total")


def _numbers(cell: Cell) -> list[str]:
    return [
        *(f"{number:.4f}" for number in (cell.value, cell.low, cell.high)),
        str(cell.num_scored),
        str(cell.num_total),
    ]


def difference_table(found: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str, profile: str, form: str) -> str:
    """Differences of each model to ``baseline`` by benchmark: ``paired.Difference`` as dictionaries, with ``holm``."""
    _check_form(form)
    if form == "csv":
        names = ("num_rows", "mean", "low", "high", "p_value", "holm", "disagreement")
        rows = [
            [
                label,
                baseline,
                one["task"],
                profile,
                *(f"{one[name]:.6g}" for name in names),
                len(one["lost"]),
                len(one["won"]),
            ]
            for label, own in found.items()
            for one in own
        ]
        return _csv_text(["model", "baseline", "task", "profile", *names, "lost", "won"], rows)
    heads = ["task", "rows", "mean difference of a row, points", "p", "p by Holm", "answers apart %", "lost / won"]
    texts = []
    for label, own in found.items():
        lines = [
            [
                _written(one["task"], form),
                f"{one['num_rows']:,}",
                f"{100 * one['mean']:+.2f} [{100 * one['low']:+.2f}, {100 * one['high']:+.2f}]",
                _written(_p(one["p_value"]), form),
                _written(_p(one["holm"]), form),
                f"{100 * one['disagreement']:.1f}",
                f"{len(one['lost'])} / {len(one['won'])}",
            ]
            for one in own
        ]
        title = f"{label} against {baseline}, profile {profile}"
        if form == "markdown":  # several follow each other: the title stands before
            texts.append(f"{title}:\n\n{_markdown(heads, lines, '').rstrip()}\n")
        else:
            texts.append(_table(heads, lines, title, form))
    return "\n".join(texts)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def _csv_text(heads: list[str], rows: list[list[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([heads, *rows])
    return out.getvalue()
