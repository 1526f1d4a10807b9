"""Charts of the report as inline SVG: numbers in, one ``Markup`` out. Pure functions, no drawing library.

A chart names no colour. A mark has the class ``c0`` ... ``c7`` and the page's stylesheet says what that is, so dark
mode and print need no second chart. A mark also has a shape of its own: colour alone never carries a meaning. Every
text passes through ``markupsafe``, so a model called ``<script>`` stays a text. Coordinates are written in tenths of
a pixel: same numbers, same bytes.

    (left, top) +---------------------+   Axis maps data to pixels; y grows upwards in data, downwards in pixels
                |  marks              |   Frame is the rectangle that marks are drawn in
                +---------------------+ (right, bottom)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape

from grace_vlm.evals.statistics import wilson_interval

Format = Callable[[float], str]
NUM_COLORS = 8
SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "M-3.6,-3.6h7.2v7.2h-7.2Z",
    "M0,-5L5,0L0,5L-5,0Z",
    "M0,-5L4.8,3.8H-4.8Z",
)
"""Circle, square, diamond, triangle around the origin: row i has shape i mod 4 and, beyond four rows, a ring."""
MAX_DRAWN_STEPS = 240
"""Points of one curve; more could not be told apart at the width of a panel."""


def element(name: str, *children: str, **attributes: object) -> Markup:
    """One SVG element. Children that are not ``Markup`` are escaped; ``class_`` is class, ``a_b`` is a-b."""
    parts = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
        if value is not None
    ]
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(parts), inner)


def _number(value: object) -> str:
    """Tenths of a pixel without a trailing zero, never ``-0``."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _svg(width: float, height: float, title: str, *children: str) -> Markup:
    box = {"viewBox": f"0 0 {_number(float(width))} {_number(float(height))}"}
    size = {"width": float(width), "height": float(height)}
    return element("svg", element("title", title), *children, role="img", **size, **box)


@dataclass(frozen=True)
class Axis:
    """The map of data [low, high] to pixels [start, stop], linear or logarithmic (then low > 0)."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of a value; a value outside is drawn at the edge."""
        value = min(max(value, self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """About ``count`` round values within the axis: 1, 2, 2.5 or 5 times a power of ten."""
        return _log_ticks(self.low, self.high, count) if self.log else _linear_ticks(self.low, self.high, count)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    found = [index * step for index in range(first, last + 1)]
    return found if len(found) > 1 else _linear_ticks(low, high, count + 1)


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) <= count:
            break
    stride = math.ceil(len(found) / count) if found else 1
    return found[::stride] if len(found) > 1 else _linear_ticks(low, high, max(2, count - 1))


def short(value: float) -> str:
    """A tick's number: three significant digits, a true minus sign."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}"


def _alike(values: Sequence[float], form: Format) -> list[tuple[float, str]]:
    """Each value with its text; plain numbers between -100 and 100 get the decimals of the longest: 0.8, 1.0."""
    texts = [form(value) for value in values]
    digits = max((len(text.partition(".")[2]) for text in texts), default=0)
    if form is short and digits < 4 and all(abs(value) < 100 for value in values):
        texts = [f"{value:.{digits}f}".replace("-", "−") for value in values]
    return list(zip(values, texts, strict=True))


def percent_tick(value: float) -> str:
    """A fraction's tick: 0.25 as ``25 %``."""
    return f"{short(round(100 * value, 6))}\u00a0%"


def megabytes_tick(value: float) -> str:
    """A size's tick in MB = 10^6 bytes."""
    return f"{short(round(value / 1e6, 6))} MB"


def percent(value: float, digits: int = 2) -> str:
    """A fraction as ``87.50 %``, the unit tied on by a no-break space."""
    return f"{100 * value:.{digits}f}\u00a0%"


def signed(value: float, digits: int = 2) -> str:
    """A fraction in points with its sign: ``+0.31``, ``−1.20``, ``0.00``."""
    text = f"{100 * value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def size(num_bytes: float) -> str:
    """Bytes in MB = 10^6 bytes, three digits that mean something."""
    return f"{num_bytes / 1e6:,.2f}\u00a0MB"


def p_text(value: float) -> str:
    """A p value, cut off where it stops to inform."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def clipped(text: str, limit: int = 240) -> str:
    """A stranger's text, fit to be shown: no control character but a line's end, cut after ``limit`` characters."""
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in text[: limit + 1]).strip()
    return shown if len(text) <= limit else shown[:limit] + "…"


def mark(x: float, y: float, index: int, title: str = "") -> Markup:
    """The shape and colour of row ``index`` at a pixel; ``title`` is what hovering says."""
    ring = " ring" if index // len(SHAPES) % 2 else ""
    return element(
        "path",
        *([element("title", title)] if title else []),
        d=SHAPES[index % len(SHAPES)],
        transform=f"translate({_number(float(x))},{_number(float(y))})",
        class_=f"mark{ring} c{index % NUM_COLORS}",
    )


def key_mark(index: int) -> Markup:
    """The mark alone, for a key beside the charts."""
    box = {"viewBox": "0 0 14 14"}
    return element("svg", mark(7, 7, index), width=14, height=14, aria_hidden="true", **box)


def _segment(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def _text(x: float, y: float, text: str, anchor: str = "start", class_: str | None = None) -> Markup:
    return element("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


@dataclass(frozen=True)
class Frame:
    """A chart's size and axes; ``draw`` puts marks on its grid."""

    width: float
    height: float
    x: Axis
    y: Axis

    def draw(
        self, title: str, marks: Sequence[str], x_label: str, x_format: Format = short, y_format: Format = short
    ) -> Markup:
        """The finished SVG. ``x_format``, ``y_format`` turn a tick's value into its text."""
        num_x = max(3, int((self.x.stop - self.x.start) / 70))
        num_y = max(3, int((self.y.start - self.y.stop) / 38))
        grid: list[Markup] = []
        for value, text in _alike(self.y.ticks(num_y), y_format):
            y = self.y.at(value)
            grid.append(_segment(self.x.start, y, self.x.stop, y, "grid"))
            grid.append(_text(self.x.start - 7, y + 3.8, text, "end"))
        for value in self.x.ticks(num_x):
            x = self.x.at(value)
            grid.append(_segment(x, self.y.start, x, self.y.start + 4, "tick"))
            grid.append(_text(x, self.y.start + 17, x_format(value), "middle"))
        grid.append(_segment(self.x.start, self.y.start, self.x.stop, self.y.start, "axis"))
        label = _text((self.x.start + self.x.stop) / 2, self.height - 4, x_label, "middle", "label")
        return _svg(self.width, self.height, title, *grid, label, *marks)


@dataclass(frozen=True)
class Point:
    """One model: ``x`` bytes, ``y`` accuracy with its interval, row ``index``."""

    label: str
    index: int
    x: float
    y: float
    low: float
    high: float


def interval(point: Point, domain: tuple[float, float], reference: float) -> Markup:
    """A table cell's plot: the 95 % interval as a line, the value as a mark, the baseline's value as a rule.

    A value outside ``domain`` is an arrow at that edge.
    """
    axis, low, value, high = Axis(*domain, 6.0, 154.0), point.low, point.y, point.high
    title = f"{100 * value:.2f} %, 95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    parts = [_segment(axis.start, 10, axis.stop, 10, "grid")]
    parts.append(_segment(axis.at(reference), 1, axis.at(reference), 19, "reference"))
    if domain[0] <= value <= domain[1]:
        parts.append(_segment(axis.at(low), 10, axis.at(high), 10, f"bar c{point.index % NUM_COLORS}"))
        parts.append(mark(axis.at(value), 10, point.index))
    else:
        tip, back = (0.0, 7.0) if value < domain[0] else (160.0, 153.0)
        arrow = f"M{back},5L{tip},10L{back},15"
        parts.append(element("path", d=arrow, class_=f"line c{point.index % NUM_COLORS}"))
    return _svg(160, 20, title, *parts)


def padded(values: Sequence[float], log: bool = False, share: float = 0.06) -> tuple[float, float]:
    """(low, high) around the values with ``share`` of their range as margin; never an empty range."""
    low, high = min(values), max(values)
    if log:
        low, high = padded([math.log(low), math.log(high)], share=share)
        return math.exp(low), math.exp(high)
    margin = share * (high - low) or max(abs(high) * share, 1e-6)
    return low - margin, high + margin


def scatter(points: Sequence[Point], width: float, height: float) -> Markup:
    """Accuracy against size (log). Points of nearly one size are set side by side; labels look for free room."""
    x_axis = Axis(*padded([p.x for p in points], log=True, share=0.12), 50.0, width - 12, log=True)
    low, high = padded([v for p in points for v in (p.low, p.high)])
    y_axis = Axis(max(0.0, low), min(1.0, high) if high < 1.2 else high, height - 44, 12.0)
    places = _side_by_side([x_axis.at(p.x) for p in points])
    marks: list[Markup] = []
    taken: list[_Box] = []
    for point, x in zip(points, places, strict=True):
        top, bottom = y_axis.at(point.high), y_axis.at(point.low)
        marks.append(_segment(x, top, x, bottom, f"bar c{point.index % NUM_COLORS}"))
        marks.append(mark(x, y_axis.at(point.y), point.index, f"{point.label}: {100 * point.y:.2f} %"))
        taken += [(x - 2, top, x + 2, bottom), (x - 6, y_axis.at(point.y) - 6, x + 6, y_axis.at(point.y) + 6)]
    bounds = (x_axis.start, y_axis.stop - 8, width, y_axis.start)
    for point, x in zip(points, places, strict=True):
        box, anchor = _free_place(point.label, x, y_axis.at(point.y), taken, bounds)
        taken.append(box)
        text_x, text_y = (box[0] if anchor == "start" else box[2]), (box[1] + box[3]) / 2
        if abs(text_y - y_axis.at(point.y)) > 9:
            marks.append(_segment(x, y_axis.at(point.y), text_x, text_y, "leader"))
        marks.append(_text(text_x, text_y + 3.8, point.label, anchor, f"name c{point.index % NUM_COLORS}"))
    title = "Accuracy against size: " + "; ".join(
        f"{p.label} {100 * p.y:.1f} % at {megabytes_tick(p.x)}" for p in points
    )
    return Frame(width, height, x_axis, y_axis).draw(
        title, marks, "weights once packed (logarithmic)", megabytes_tick, percent_tick
    )


_Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""


def _side_by_side(places: Sequence[float], gap: float = 13.0) -> list[float]:
    """Move marks that would cover each other apart, ``gap`` pixels each, around their common place."""
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and places[i] - places[groups[-1][-1]] < gap / 2:
            groups[-1].append(i)
        else:
            groups.append([i])
    moved = list(places)
    for group in groups:
        centre = sum(places[i] for i in group) / len(group)
        for rank, i in enumerate(sorted(group)):
            moved[i] = centre + (rank - (len(group) - 1) / 2) * gap if len(group) > 1 else places[i]
    return moved


def _free_place(label: str, x: float, y: float, taken: Sequence[_Box], bounds: _Box) -> tuple[_Box, str]:
    """The candidate place of a label that covers least: right, left, then higher and lower on either side."""
    width = 7.0 * len(label)
    best: tuple[float, _Box, str] | None = None
    for shift in (0, -16, 16, -32, 32, -48, 48, -64, 64, -80, 80):
        for side in ("start", "end"):
            for reach in (9, 24, 44):
                left = x + reach if side == "start" else x - reach - width
                box = (left, y + shift - 7, left + width, y + shift + 7)
                outside = max(0.0, bounds[0] - box[0], box[2] - bounds[2], bounds[1] - box[1], box[3] - bounds[3])
                cost = 40 * outside + 4 * sum(_overlap(box, other) for other in taken)
                cost += abs(shift) + 0.5 * reach + (4 if side == "end" else 0)
                if best is None or cost < best[0]:
                    best = (cost, box, side)
    assert best is not None
    return best[1], best[2]


def _overlap(a: _Box, b: _Box) -> float:
    """Covered area in square pixels, plus a constant for touching at all."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall + 10 if wide > 0 and tall > 0 else 0.0


@dataclass(frozen=True)
class Curve:
    """One run's values by step; ``index`` is its row."""

    label: str
    index: int
    steps: Sequence[int]
    values: Sequence[float]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean over ``window`` values (made odd); at the ends, over the part of the window that exists."""
    half, total, sums = window // 2, 0.0, [0.0]
    for value in values:
        total += value
        sums.append(total)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def curves(name: str, runs: Sequence[Curve], noisy: bool, width: float = 330, height: float = 210) -> Markup:
    """One quantity of several runs; if ``noisy``, moving means (a twentieth of the run) over faint raw values.

    The axis covers the lines and the middle 96 % of the raw values; what lies outside is drawn at the edge.
    """
    means = [smoothed(run.values, max(5, len(run.values) // 20) if noisy else 1) for run in runs]
    raw = sorted(value for run in runs for value in run.values)
    cut = len(raw) // 50
    shown = [raw[cut], raw[-1 - cut], *(value for mean in means for value in mean)]
    log = min(shown) > 0 and max(shown) / min(shown) > 20
    last = max(run.steps[-1] for run in runs)
    x_axis = Axis(0.0, float(max(last, 1)), 48.0, width - 10)
    y_axis = Axis(*padded(shown, log=log), height - 40, 10.0, log)
    marks: list[Markup] = []
    for run, mean in zip(runs, means, strict=True):
        picked = _evenly(len(run.values), MAX_DRAWN_STEPS)
        for values, kind in ((run.values, "raw"), (mean, "line")):
            dots = " ".join(f"{_px(x_axis.at(run.steps[i]))},{_px(y_axis.at(values[i]))}" for i in picked)
            marks.append(element("polyline", points=dots, class_=f"{kind} c{run.index % NUM_COLORS}"))
    ends = "; ".join(
        f"{run.label} from {short(mean[0])} to {short(mean[-1])}" for run, mean in zip(runs, means, strict=True)
    )
    return Frame(width, height, x_axis, y_axis).draw(f"{name}: {ends}", marks, "step")


def _px(value: float) -> str:
    return _number(float(value))


def _evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` indices from the first to the last of ``count``."""
    if count <= limit:
        return list(range(count))
    return [i * (count - 1) // (limit - 1) for i in range(limit)]


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def by_depth(panel: tuple[str, Any]) -> tuple[int, str]:
    """In the order in which a decoder layer applies them; others after, by name."""
    name = panel[0]
    return (PROJECTIONS.index(name) if name in PROJECTIONS else len(PROJECTIONS), name)


def place_of(module: str) -> tuple[int, str]:
    """(layer, projection) of ``...layers.3.self_attn.q_proj``; a module outside the layers is (0, its whole name)."""
    parts = module.split(".")
    for before, part in pairwise(parts):
        if before == "layers" and part.isascii() and part.isdigit() and len(part) < 7:
            return int(part), parts[-1]
    return 0, module


def layer_dots(name: str, rows: Sequence[tuple[str, int, dict[int, float]]], domain: tuple[float, float]) -> Markup:
    """One projection's error by layer: (label, row index, {layer: error}); ``domain`` is common to all projections."""
    width, height = 250.0, 190.0
    last = max(layer for _, _, errors in rows for layer in errors)
    x_axis = Axis(-0.5, last + 0.5, 46.0, width - 8)
    y_axis = Axis(*domain, height - 40, 8.0, log=True)
    marks: list[Markup] = []
    for label, index, errors in rows:
        path = " ".join(f"{_px(x_axis.at(layer))},{_px(y_axis.at(value))}" for layer, value in sorted(errors.items()))
        marks.append(element("polyline", points=path, class_=f"raw c{index % NUM_COLORS}"))
        marks += [
            mark(x_axis.at(layer), y_axis.at(value), index, f"{label}, layer {layer}: {short(value)}")
            for layer, value in sorted(errors.items())
        ]
    means = "; ".join(f"{label} mean {short(sum(e.values()) / len(e))}" for label, _, e in rows)
    axes = Frame(width, height, x_axis, y_axis)
    return axes.draw(f"{name}: {means}", marks, "layer", lambda v: short(v) if v == int(v) else "")


@dataclass(frozen=True)
class Bin:
    """Questions of similar ``mean``: how many, how many wrong, and the 95 % interval of the error rate."""

    mean: float
    num_wrong: int
    num: int
    low: float
    high: float


def quantile_bins(points: Sequence[tuple[float, int]], num_bins: int = 10) -> list[Bin]:
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
        found.append(Bin(sum(value for value, _ in points_of) / num, wrong, num, low, high))
    return found


def error_bins(name: str, bins: Sequence[Bin], x_label: str, width: float = 400, height: float = 260) -> Markup:
    """Error rate with its interval against the mean of each bin; logarithmic in x when the means span 30-fold."""
    means = [b.mean for b in bins]
    log = min(means) > 0 and max(means) / min(means) > 30
    x_axis = Axis(*padded(means, log=log), 52.0, width - 12, log)
    y_axis = Axis(0.0, min(1.0, 1.06 * max(b.high for b in bins)), height - 44, 10.0)
    path = " ".join(f"{_px(x_axis.at(b.mean))},{_px(y_axis.at(b.num_wrong / b.num))}" for b in bins)
    marks = [element("polyline", points=path, class_="raw c0")]
    for b in bins:
        x = x_axis.at(b.mean)
        said = f"{b.num_wrong} of {b.num} wrong at mean {short(b.mean)}"
        marks.append(_segment(x, y_axis.at(b.high), x, y_axis.at(b.low), "bar c0"))
        marks.append(mark(x, y_axis.at(b.num_wrong / b.num), 0, said))
    title = f"{name}: " + ", ".join(f"{short(b.mean)}: {100 * b.num_wrong / b.num:.1f} %" for b in bins)
    return Frame(width, height, x_axis, y_axis).draw(title, marks, x_label, short, percent_tick)
