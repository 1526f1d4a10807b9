"""``results.json`` and the files it names become one page, ``report.html``.

    results.json --+
    answers/*.jsonl +--> views of each section --> report.html.jinja --> report.html (whole or not at all)
    metrics.jsonl --+

The page stands alone: styles, charts and pictures are inside it, it has no script, and its content policy lets a
browser load nothing. Answers, questions and labels are strangers' text: Jinja escapes each of them. A picture is
copied, never decoded, and only from inside the data's root. The same files give the same page, byte for byte.

Of the results, ``results.json`` alone is needed. What else is missing leaves its section out, in one sentence that
says why.
"""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grace_vlm.checkpoint.atomic import disk_errors
from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import DataError
from grace_vlm.evals import charts
from grace_vlm.evals.statistics import wilson_interval

PAGE = "report.html"
NUM_EXAMPLES = 20
MAX_PICTURE_BYTES = 200_000
"""A larger picture is named, not embedded: twenty of them still make a page that can be mailed."""
CURVES = (
    ("cross_entropy", "Cross entropy, nats"),
    ("distillation", "Distillation term"),
    ("relational", "Relational term, 1 − CKA"),
    ("weight", "Adaptive weight β"),
)
NUM_BINS = 10
MIN_GATE_POINTS = 20

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    """Something read from a file: keys we do not know are ignored, NaN and Infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Row(_Record):
    """One model of the comparison; None where it is the baseline, or where there is none."""

    name: str
    label: str
    method: str = ""
    scheme: str = ""
    num_parameters: Annotated[int, Field(gt=0)]
    num_correct: Count
    num_scored: Count
    accuracy: Share
    low: Share
    high: Share
    bytes: Count
    bits_per_weight: Annotated[float, Field(gt=0)]
    agreement: Share | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
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
    points: list[tuple[float, float, Annotated[int, Field(ge=0, le=1)]]] = []


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
    layers: dict[str, dict[str, Annotated[float, Field(ge=0)]]] = {}
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
    cross_entropy: float | None = None
    distillation: float | None = None
    relational: float | None = None
    weight: float | None = None


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
    answers: list[tuple[int, Row, AnswerLine]] = field(default_factory=list)


def render_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from ``folder/results.json``.

    Returns:
        The page's path. A page of before is replaced in one step, or untouched if anything fails.

    Raises:
        DataError: results.json is missing or not of format 1. CheckpointError: the disk refuses the page.
    """
    results = read_results(folder / "results.json")
    page = _environment().get_template("report.html.jinja").render(views(folder, results))
    path = folder / PAGE
    _replace(path, page.encode("utf-8", errors="replace"))
    return path


def read_results(path: Path) -> Results:
    """Parse and check; anything wrong is one line that names the key."""
    content = read_object(path, DataError)
    try:
        results = Results.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is no result of a comparison: {_first(error)}") from error
    names = [row.name for row in results.rows]
    if len(set(names)) < len(names):
        raise DataError(f"{path} names a row twice ({', '.join(names)}); expected one row a model")
    if results.baseline not in names:
        raise DataError(f"{path} has the baseline {results.baseline!r}; expected one of its rows ({', '.join(names)})")
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
        lines = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
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
    domain = charts.padded([value for row in results.rows for value in (row.low, row.high)])
    cells = [
        charts.interval(row.low, row.accuracy, row.high, domain, baseline.accuracy, index)
        for index, row in enumerate(results.rows)
    ]
    return {
        "results": results,
        "baseline": baseline,
        "best": best,
        "headline": headline(best, baseline),
        "standfirst": standfirst(results, best, baseline),
        "cells": cells,
        "domain": domain,
        "scatter": [_scatter(results.rows, width, height) for width, height in ((980, 430), (350, 380))],
        "kinds": sorted({kind for row in results.rows for kind in row.kinds}),
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
    # Rounded first: "0.0 points below" is not something to read.
    points = round(100 * best.difference, 1)
    side = f"as many as {baseline.label}" if points == 0 else f"{abs(points):.1f} points "
    side += "" if points == 0 else f"{'above' if points > 0 else 'below'} {baseline.label}"
    limits = ""
    if best.difference_low is not None and best.difference_high is not None:
        limits = f" (95 % interval {signed(best.difference_low, 1)} to {signed(best.difference_high, 1)} points)"
    return f"{start}, {side}{limits}."


def standfirst(results: Results, best: Row, baseline: Row) -> str:
    """What the headline leaves out: the cost, the choice that was made, what the interval allows to say."""
    parts = []
    num_int4 = sum(row.scheme.startswith("w4") for row in results.rows)
    if best.scheme.startswith("w4") and num_int4 > 1:
        parts.append(f"It is the most accurate of {num_int4} INT4 rows.")
    if best.name != baseline.name:
        parts.append(
            f"A weight takes {best.bits_per_weight:.2f} bits on average; {baseline.bits_per_weight:.2f} in {baseline.label}."
        )
    if best.difference_low is not None and best.difference_high is not None:
        if best.difference_low <= 0 <= best.difference_high:
            parts.append("The interval includes zero: these questions cannot tell the two apart.")
        else:
            parts.append("The interval excludes zero: the difference is more than chance among these questions.")
    return " ".join(parts)


def _scatter(rows: Sequence[Row], width: int, height: int) -> Markup:
    points = [
        charts.Point(row.label, index, row.packed_bytes, row.accuracy, row.low, row.high)
        for index, row in enumerate(rows)
    ]
    return charts.scatter(points, width, height, "weights once packed (logarithmic)")


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
    for key, title in CURVES:
        runs = []
        for index, row, lines in diaries:
            values = {line.step: getattr(line, key) for line in lines if getattr(line, key) is not None}
            if len(values) > 1:
                runs.append(charts.Curve(row.label, index, sorted(values), [values[step] for step in sorted(values)]))
        if runs:
            panels.append((title, charts.curves(title, runs)))
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
            layer, projection = _place_of(name)
            by_projection[projection][layer] = value
        for projection, errors in by_projection.items():
            panels[projection].append((label, indices[0], errors))
    if not panels:
        return Section(missing="Per-layer error is left out: results.json has no quantized row with an error above 0.")
    domain = charts.padded([value for errors_of in groups for _, value in errors_of], log=True)
    drawn = [(name, charts.layer_dots(name, rows, domain)) for name, rows in sorted(panels.items(), key=_by_depth)]
    return Section({"panels": drawn, "key": key})


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _by_depth(panel: tuple[str, Any]) -> tuple[int, str]:
    """In the order in which a decoder layer applies them; others after, by name."""
    name = panel[0]
    return (PROJECTIONS.index(name) if name in PROJECTIONS else len(PROJECTIONS), name)


def _place_of(module: str) -> tuple[int, str]:
    """(layer, projection) of ``...layers.3.self_attn.q_proj``; a module outside the layers is (0, its whole name)."""
    parts = module.split(".")
    for before, part in zip(parts, parts[1:], strict=False):
        if before == "layers" and part.isascii() and part.isdigit() and len(part) < 7:
            return int(part), parts[-1]
    return 0, module


def gate_section(gate: Gate) -> Section:
    """The teacher's error rate where it is sure and where it is not: by entropy, and by the gate made of it."""
    if len(gate.points) < MIN_GATE_POINTS:
        reason = "no teacher took part" if gate.teacher is None else f"only {len(gate.points)} questions have a gate"
        return Section(missing=f"Teacher entropy and gate are left out: {reason}.")
    by_entropy = quantile_bins([(entropy, 1 - correct) for entropy, _, correct in gate.points])
    by_gate = quantile_bins([(value, 1 - correct) for _, value, correct in gate.points])
    panels = [
        ("By entropy", charts.error_bins("Teacher error by entropy", by_entropy, "mean entropy of the bin, nats")),
        ("By gate", charts.error_bins("Teacher error by gate", by_gate, "mean gate of the bin")),
    ]
    sure, unsure = by_entropy[0], by_entropy[-1]
    note = (
        f"The surest {sure.num:,} questions: {percent(sure.num_wrong / sure.num, 1)} wrong; "
        f"the least sure {unsure.num:,}: {percent(unsure.num_wrong / unsure.num, 1)}."
    )
    return Section({"panels": panels}, notes=[note])


def quantile_bins(points: Sequence[tuple[float, int]], num_bins: int = NUM_BINS) -> list[charts.Bin]:
    """(value, wrong) points in at most ``num_bins`` bins of nearly equal counts; equal values share a bin."""
    ordered = sorted(points)
    bins: list[list[tuple[float, int]]] = [[]]
    for number, point in enumerate(ordered):
        due = number >= len(bins) * len(ordered) / num_bins
        if due and bins[-1] and point[0] != bins[-1][-1][0]:
            bins.append([])
        bins[-1].append(point)
    found = []
    for points_of in bins:
        num, wrong = len(points_of), sum(wrong for _, wrong in points_of)
        low, high = wilson_interval(wrong, num)
        found.append(charts.Bin(sum(value for value, _ in points_of) / num, wrong, num, low, high))
    return found


def examples_section(folder: Path, results: Results) -> Section:
    """Twenty questions that the models answer differently, of as many kinds as there are."""
    notes: list[str] = []
    asked: dict[int, list[tuple[int, Row, AnswerLine]]] = defaultdict(list)
    for index, row in enumerate(results.rows):
        try:
            for line in _answers(folder, row):
                asked[line.row].append((index, row, line))
        except DataError as error:
            notes.append(f"Answers of {row.label} are not shown: {error}.")
    chosen = choose_examples(asked)
    if not chosen:
        return Section(missing=f"Examples are left out: no answers could be read. {' '.join(notes)}".strip())
    examples = []
    for row_number in chosen:
        answers = asked[row_number]
        question = answers[0][2]
        try:
            picture = embed_picture(folder / results.data.root, question.image) if question.image else None
            examples.append(Example(question, picture, "asked without a picture", answers))
        except DataError as error:
            examples.append(Example(question, None, f"picture left out: {error}", answers))
    return Section(examples, notes=notes)


def _answers(folder: Path, row: Row) -> list[AnswerLine]:
    if row.answers is None:
        raise DataError("results.json names no file of them")
    path = _inside(folder, row.answers)
    return read_lines(path, AnswerLine)


def choose_examples(asked: dict[int, list[tuple[int, Row, AnswerLine]]], limit: int = NUM_EXAMPLES) -> list[int]:
    """Row numbers, the most disputed first within a kind, kinds taking turns, the most disputed kind first.

    A question is disputed by the size of the smaller camp (right or wrong), then by the number of different answers.
    """
    kinds: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
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
    except (OSError, ValueError) as error:
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
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        media_type = "image/png"
    elif content.startswith(b"\xff\xd8\xff"):
        media_type = "image/jpeg"
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        media_type = "image/webp"
    else:
        raise DataError("it is no PNG, JPEG or WebP")
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def percent(value: float, digits: int = 2) -> str:
    """A fraction as ``87.50 %``, the unit tied on."""
    return f"{100 * value:.{digits}f} %"


def signed(value: float, digits: int = 2) -> str:
    """A fraction in points with its sign: ``+0.31``, ``−1.20``, ``0.00``."""
    text = f"{100 * value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def size(num_bytes: float) -> str:
    """Bytes in MB = 10^6 bytes, three digits that mean something."""
    return f"{num_bytes / 1e6:,.2f} MB"


def p_text(value: float) -> str:
    """A p value, cut off where it stops to inform."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def clipped(text: str, limit: int = 240) -> str:
    """A stranger's text, fit to be shown: no control characters, cut after ``limit`` characters."""
    shown = "".join(c if c.isprintable() else " " for c in text[: limit + 1]).strip()
    return shown if len(text) <= limit else shown[:limit] + "…"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "size": size, "p": p_text, "clipped": clipped}
    environment.globals["key_mark"] = charts.key_mark
    return environment


def _replace(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step: written beside it, made durable, renamed."""
    path = path.absolute()
    stage = path.with_name(f".partial-{path.name}-{os.getpid()}")
    try:
        with disk_errors(path, len(content)):
            with stage.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(stage, path)
    finally:
        with suppress(OSError):
            stage.unlink()
