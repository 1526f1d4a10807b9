"""``results.json`` and the files it names become one page, ``report.html``.

    results.json --+
    answers/*.jsonl +--> views of each section --> report.html.jinja --> report.html (whole or not at all)
    metrics.jsonl --+

The page stands alone: styles, charts and pictures are inside it, it has no script, and its content policy lets a
browser load nothing. Answers, questions and labels are strangers' text: Jinja escapes each of them. A picture is
copied, never decoded, and only from inside the data's root. The same files give the same page, byte for byte.

Only ``results.json`` is needed: whatever else is missing leaves its section out, in one sentence that says why.
"""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grace_vlm.checkpoint.atomic import write_bytes_atomic
from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import DataError
from grace_vlm.evals import charts
from grace_vlm.evals.charts import percent, signed

PAGE = "report.html"
NUM_EXAMPLES = 20
MAX_PICTURE_BYTES = 200_000
"""A larger picture is named, not embedded: twenty of them still make a page that can be mailed."""
_PICTURE = re.compile(rb"(?s)(?P<png>\x89PNG\r\n\x1a\n)|(?P<jpeg>\xff\xd8\xff)|(?P<webp>RIFF.{4}WEBP)")
MAX_CELL_DISTANCE = 0.2
CURVES = (
    ("cross_entropy", "Cross entropy, nats", True),
    ("distillation", "Distillation term", True),
    ("relational", "Relational term, 1 − CKA", True),
    ("weight", "Adaptive weight β", False),
    ("codes_flipped_fraction", "Codes flipped in a step, share", True),
    ("scale_drift", "Mean drift of the scales", False),
)
"""(key in metrics.jsonl, heading, noisy)"""
MIN_GATE_POINTS = 20

# Bounded, so that no chart meets an overflow.
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Measure = Annotated[float, Field(ge=-1e18, le=1e18)]


class _Record(BaseModel):
    """Something read from a file: keys we do not know are ignored, NaN and Infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Row(_Record):
    """One model of the comparison; None where it is the baseline, or where there is none."""

    name: str
    label: str
    method: str = ""
    scheme: str = ""
    num_parameters: Annotated[int, Field(gt=0, le=10**15)]
    num_correct: Count
    num_scored: Count
    accuracy: Share
    low: Share
    high: Share
    bytes: Count
    bits_per_weight: Annotated[float, Field(ge=0.01, le=64)]
    agreement: Share | None = None
    difference: Measure | None = None
    difference_low: Measure | None = None
    difference_high: Measure | None = None
    p_value: Share | None = None
    kinds: dict[str, tuple[Count, Count]] = {}
    answers: str | None = None
    metrics: str | None = None

    @property
    def packed_bytes(self) -> float:
        """Bytes of the weights once packed. The folder on the disk may hold codes *and* baked BF16 weights."""
        return self.num_parameters * self.bits_per_weight / 8


class Check(_Record):
    """Something the run asserts about itself."""

    name: str
    value: str
    passed: bool


class Gate(_Record):
    """(entropy in nats, gate, teacher was right) of each question."""

    teacher: str | None = None
    points: list[tuple[Measure, Measure, Annotated[int, Field(ge=0, le=1)]]] = []


class Data(_Record):
    """The questions; pictures lie below ``root``, relative to the folder of the results."""

    path: str
    root: str
    num_questions: Count


class Results(_Record):
    """``results.json``, format 1."""

    format_version: Literal[1]
    title: str
    created: str = ""
    command: str = ""
    hardware: str = ""
    versions: dict[str, str] = {}
    data: Data
    baseline: str
    rows: Annotated[list[Row], Field(min_length=1)]
    layers: dict[str, dict[str, Measure]] = {}
    gate: Gate = Gate()
    checks: list[Check] = []


class AnswerLine(_Record):
    """One line of an answers file."""

    row: int
    id: str
    kind: str = ""
    image: str | None = None
    question: str
    gold: str
    answer: str
    correct: bool


class MetricsLine(_Record):
    """The part of a training diary's line that is drawn."""

    step: Count
    cross_entropy: Measure | None = None
    distillation: Measure | None = None
    relational: Measure | None = None
    weight: Measure | None = None
    codes_flipped_fraction: Measure | None = None
    scale_drift: Measure | None = None


@dataclass(frozen=True)
class Section:
    """What a part of the page shows; with ``missing``, the sentence that stands in its place."""

    content: Any = None
    missing: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Example:
    """One question, its picture as a data: URI (or why there is none), and (row index, row, answer) of each model."""

    question: AnswerLine
    picture: str | None
    no_picture: str
    answers: list[tuple[int, Row, AnswerLine]]


def render_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from ``folder/results.json``.

    Returns:
        The page's path. A page of before is replaced in one step, or untouched if anything fails.

    Raises:
        DataError: results.json is missing or not of format 1. CheckpointError: the disk refuses the page.
    """
    results = read_results(folder / "results.json")
    page = _environment().get_template("report.html.jinja").render(views(folder, results))
    write_bytes_atomic(folder / PAGE, page.encode("utf-8", errors="replace"))
    return folder / PAGE


def read_results(path: Path) -> Results:
    """Parse and check; anything wrong is one line that names the key."""
    content = read_object(path, DataError)
    try:
        results = Results.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is no result of a comparison: {_first(error)}") from error
    names = [row.name for row in results.rows]
    if names.count(results.baseline) != 1 or len(set(names)) < len(names):
        rows = ", ".join(names)
        raise DataError(
            f"{path} has rows {rows} and baseline {results.baseline!r}; expected one row a model, one the baseline"
        )
    return results


def _first(error: ValidationError) -> str:
    """The first complaint of pydantic on one line: where, what."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the line"
    return f"{where}: {first['msg'].splitlines()[0]}"


Line = TypeVar("Line", bound=_Record)


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of a JSONL file; a last line that a kill cut short is left out, any other bad line is a DataError."""
    try:
        if not path.is_file():
            raise DataError(f"{path.name} is not there")
        lines = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read ({error})") from error
    found: list[Line] = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                found.append(kind.model_validate_json(line))
        except ValidationError as error:
            if number < len(lines):
                raise DataError(f"line {number} of {path.name} is unusable: {_first(error)}") from error
    return found


def views(folder: Path, results: Results) -> dict[str, Any]:
    """Everything the template shows, computed; the template only arranges."""
    baseline = next(row for row in results.rows if row.name == results.baseline)
    best = best_row(results)
    # One row that collapsed must not press the intervals of all others into a dot: it becomes an arrow at the edge.
    near = [row for row in results.rows if abs(row.accuracy - baseline.accuracy) <= MAX_CELL_DISTANCE]
    domain = charts.padded([value for row in near for value in (row.low, row.high)])
    points = [charts.Point(r.label, i, r.packed_bytes, r.accuracy, r.low, r.high) for i, r in enumerate(results.rows)]
    kinds = sorted({kind for row in results.rows for kind in row.kinds})
    return {
        "results": results,
        "baseline": baseline,
        "best": best,
        "headline": headline(best, baseline),
        "standfirst": standfirst(results, best, baseline),
        "cells": [charts.interval(point, domain, baseline.accuracy) for point in points],
        "domain": domain,
        "scatter": [charts.scatter(points, width, height) for width, height in ((980, 430), (350, 380))],
        "kinds": [(kind, max(row.kinds.get(kind, (0, 0))[1] for row in results.rows)) for kind in kinds],
        "curves": curves_section(folder, results.rows),
        "layers": layers_section(results),
        "gate": gate_section(results.gate),
        "examples": examples_section(folder, results),
    }


def best_row(results: Results) -> Row:
    """The most accurate INT4 row (else any row but the baseline); of equals, the one with fewest bytes."""
    others = [row for row in results.rows if row.name != results.baseline] or results.rows
    int4 = [row for row in others if row.scheme.startswith("w4")]
    return min(int4 or others, key=lambda row: (-row.accuracy, row.bytes))


def headline(best: Row, baseline: Row) -> str:
    """The answer in one sentence, with the interval of the paired difference."""
    start = f"{best.label} answers {percent(best.accuracy, 1)} of {best.num_scored:,} questions correctly"
    if best.difference is None:
        return f"{start}."
    points = round(100 * best.difference, 1)  # rounded first: "0.0 points below" is not something to read
    away = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}" if points else "as many as"
    start += f", {away} {baseline.label}"
    if best.difference_low is None or best.difference_high is None:
        return f"{start}."
    return f"{start} (95\u00a0% interval {signed(best.difference_low, 1)} to {signed(best.difference_high, 1)} points)."


def standfirst(results: Results, best: Row, baseline: Row) -> str:
    """What the headline leaves out: the cost, the choice that was made, what the interval allows to say."""
    parts = []
    num_int4 = sum(row.scheme.startswith("w4") for row in results.rows)
    if best.scheme.startswith("w4") and num_int4 > 1:
        parts.append(f"It is the most accurate of {num_int4} INT4 rows.")
    if best.name != baseline.name:
        cost, before = best.bits_per_weight, baseline.bits_per_weight
        parts.append(f"A weight takes {cost:.2f} bits on average; {before:.2f} in {baseline.label}.")
    if best.difference_low is not None and best.difference_high is not None:
        if best.difference_low <= 0 <= best.difference_high:
            parts.append("The interval includes zero: these questions cannot tell the two apart.")
        else:
            parts.append("The interval excludes zero: the choice of questions does not explain the difference.")
    return " ".join(parts)


def curves_section(folder: Path, rows: Sequence[Row]) -> Section:
    """A panel for each quantity, with one curve for each row that has a training diary."""
    notes, diaries = [], []
    for index, row in enumerate(rows):
        if row.metrics is None:
            continue
        try:
            diaries.append((index, row, read_lines(folder / row.metrics, MetricsLine)))
        except DataError as error:
            notes.append(f"{row.label} is not drawn: {error}.")
    panels = []
    for key, title, noisy in CURVES:
        runs = []
        for index, row, lines in diaries:
            values = {line.step: getattr(line, key) for line in lines if getattr(line, key) is not None}
            if len(values) > 1:
                runs.append(charts.Curve(row.label, index, sorted(values), [values[step] for step in sorted(values)]))
        if runs:
            panels.append((title, charts.curves(title, runs, noisy)))
    if not panels:
        reason = " ".join(notes) or "no row was trained here, so none has a training diary."
        return Section(missing=f"Loss curves are left out: {reason}")
    return Section({"panels": panels, "key": [(index, row.label) for index, row, _ in diaries]}, notes=notes)


def layers_section(results: Results) -> Section:
    """A panel for each projection: error by layer, one mark a row. Rows with the same errors share their marks."""
    groups: dict[tuple[tuple[str, float], ...], list[int]] = defaultdict(list)
    for index, row in enumerate(results.rows):
        errors = {name: value for name, value in results.layers.get(row.name, {}).items() if value > 0}
        if errors:
            groups[tuple(sorted(errors.items()))].append(index)
    panels: dict[str, list[tuple[str, int, dict[int, float]]]] = defaultdict(list)
    key = []
    for errors_of, indices in groups.items():
        label = " = ".join(results.rows[index].label for index in indices)
        key.append((indices[0], label))
        by_projection: dict[str, dict[int, float]] = defaultdict(dict)
        for name, value in errors_of:
            layer, projection = charts.place_of(name)
            by_projection[projection][layer] = value
        for projection, by_layer in by_projection.items():
            panels[projection].append((label, indices[0], by_layer))
    if not panels:
        return Section(missing="Per-layer error is left out: results.json has no quantized row with an error above 0.")
    domain = charts.padded([value for errors_of in groups for _, value in errors_of], log=True)
    in_order = sorted(panels.items(), key=charts.by_depth)
    return Section({"panels": [(name, charts.layer_dots(name, rows, domain)) for name, rows in in_order], "key": key})


def gate_section(gate: Gate) -> Section:
    """The teacher's error rate where it is sure and where it is not: by entropy, and by the gate made of it."""
    if len(gate.points) < MIN_GATE_POINTS:
        reason = "no teacher took part" if gate.teacher is None else f"only {len(gate.points)} questions have a gate"
        return Section(missing=f"Teacher entropy and gate are left out: {reason}.")
    by_entropy = charts.quantile_bins([(entropy, 1 - correct) for entropy, _, correct in gate.points])
    by_gate = charts.quantile_bins([(value, 1 - correct) for _, value, correct in gate.points])
    panels = [
        ("By entropy", charts.error_bins("Teacher error by entropy", by_entropy, "mean entropy of the bin, nats")),
        ("By gate", charts.error_bins("Teacher error by gate", by_gate, "mean gate of the bin")),
    ]
    sure, unsure = (f"{b.num:,} questions: {percent(b.num_wrong / b.num, 1)}" for b in (by_entropy[0], by_entropy[-1]))
    return Section({"panels": panels}, notes=[f"Wrong of the surest {sure}; of the least sure {unsure}."])


def examples_section(folder: Path, results: Results) -> Section:
    """Twenty questions that the models answer differently, of as many kinds as there are."""
    notes: list[str] = []
    asked: dict[int, list[tuple[int, Row, AnswerLine]]] = defaultdict(list)
    for index, row in enumerate(results.rows):
        try:
            for line in read_lines(_inside(folder, row.answers), AnswerLine) if row.answers is not None else ():
                asked[line.row].append((index, row, line))
        except DataError as error:
            notes.append(f"Answers of {row.label} are not shown: {error}.")
    if not asked:
        return Section(missing=f"Examples are left out: no answers could be read. {' '.join(notes)}".strip())
    examples = []
    for answers in (asked[number] for number in choose_examples(asked)):
        question, picture, why_not = answers[0][2], None, "asked without a picture"
        try:
            if question.image:
                picture = embed_picture(folder / results.data.root, question.image)
        except DataError as error:
            why_not = f"picture left out: {error}"
        examples.append(Example(question, picture, why_not, answers))
    return Section(examples, notes=notes)


def choose_examples(asked: dict[int, list[tuple[int, Row, AnswerLine]]], limit: int = NUM_EXAMPLES) -> list[int]:
    """Row numbers, the most disputed first within a kind, kinds taking turns, the most disputed kind first.

    A question is disputed by the size of the smaller camp (right or wrong), then by the number of different answers.
    """
    kinds: dict[str, list[tuple[int, int, int]]] = defaultdict(list)  # (-smaller camp, -different answers, row)
    for number, answers in asked.items():
        right = sum(line.correct for _, _, line in answers)
        different = len({line.answer.strip().lower() for _, _, line in answers})
        kinds[answers[0][2].kind].append((-min(right, len(answers) - right), -different, number))
    queues = [sorted(ranked) for _, ranked in sorted(kinds.items(), key=lambda item: (min(item[1]), item[0]))]
    chosen: list[int] = []
    for turn in range(max((len(queue) for queue in queues), default=0)):
        chosen += [queue[turn][2] for queue in queues if turn < len(queue)]
        if len(chosen) >= limit:
            break
    return chosen[:limit]


def _inside(root: Path, name: str) -> Path:
    """``root / name`` with links resolved; a DataError if it lies outside ``root``."""
    try:
        home = root.resolve()
        path = (home / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: Python 3.11's word for a loop of links
        raise DataError(f"its path cannot be resolved ({error})") from error
    if not path.is_relative_to(home):
        raise DataError("its path leads out of the folder")
    return path


def embed_picture(root: Path, name: str) -> str:
    """The bytes of a PNG, JPEG or WebP below ``root`` as a data: URI; a DataError says why not. Nothing is decoded."""
    path = _inside(root, name)
    try:
        if not path.is_file():
            raise DataError("there is no such file")
        with path.open("rb") as stream:
            content = stream.read(MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror})") from error
    if len(content) > MAX_PICTURE_BYTES:
        raise DataError(f"it is larger than {MAX_PICTURE_BYTES:,} bytes")
    kind = _PICTURE.match(content)
    if kind is None:
        raise DataError("it is no PNG, JPEG or WebP")
    return f"data:image/{kind.lastgroup};base64,{base64.b64encode(content).decode('ascii')}"


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {f.__name__: f for f in (percent, signed, charts.size, charts.p_text, charts.clipped)}
    environment.globals["key_mark"] = charts.key_mark
    return environment
