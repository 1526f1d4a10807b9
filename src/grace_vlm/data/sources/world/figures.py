"""Charts of real figures: vertical and horizontal bars, lines, pies and tables, with few enough marks to be read.

Numbers are shown with at most three figures before or after the point, and what is asked for is what is shown. Where no
numbers are printed, a chart is asked only what its marks tell: which is largest, how many, which of two.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from grace_vlm.data.sources.grids import RULE, light
from grace_vlm.data.sources.world.drawn import SIDE_PX, Asked, Kind, said
from grace_vlm.data.sources.world.series import Series, sample
from grace_vlm.media.canvas import Canvas, Rgb, text_width

INK: Rgb = (40, 40, 40)
STRONG: Rgb = (120, 120, 120)
FILLS: tuple[Rgb, ...] = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (23, 160, 170),
)  # fmt: skip
LAYOUTS = ("columns", "bars", "line", "pie", "table")
TITLE_PX, LABEL_PX = 13, 12
_PLACES = ("the first", "the second", "the third", "the fourth", "the fifth", "the sixth", "the seventh")
MIN_GAP = 0.04
"""Numbers that are compared differ by at least this part of the axis, so that a chart shows it."""


@dataclass(frozen=True)
class Figure:
    """A chart. ``texts``: the numbers as printed; ``has_numbers``: whether they are."""

    layout: str
    background: Rgb
    fill: int
    series: Series
    texts: tuple[str, ...]
    has_numbers: bool

    def ranked(self) -> list[int]:
        """Places from the largest number to the smallest."""
        return sorted(range(len(self.texts)), key=lambda place: -float(self.texts[place]))


def compose(rng: random.Random, listing: list[list[Series]]) -> Figure:
    """A chart whose numbers all differ as printed."""
    while True:
        series = rng.choice(rng.choice(listing))
        layout = _layout(rng, series)
        part = sample(rng, series, rng.randint(3, {"columns": 6, "line": 7, "pie": 5}.get(layout, 6)))
        texts = _texts(part.values)
        if _is_good(layout, part, texts):
            has_numbers = (
                layout == "table"
                or (layout != "line" and rng.random() < 0.6)
                or (layout == "line" and len(texts) <= 4 and rng.random() < 0.6)
            )
            return Figure(layout, light(rng), rng.randrange(len(FILLS)), part, texts, has_numbers)


def _layout(rng: random.Random, series: Series) -> str:
    if series.is_time:
        return rng.choice(("columns", "line", "table", "bars"))
    return rng.choice(("bars", "bars", "table", "pie" if series.is_share else "columns"))


def _texts(values: tuple[float, ...]) -> tuple[str, ...]:
    largest = max(abs(value) for value in values)
    digits = 0 if largest >= 100 else 1
    return tuple(f"{value:.{digits}f}" if value % 1 or digits == 0 else f"{value:.0f}" for value in values)


def _is_good(layout: str, part: Series, texts: tuple[str, ...]) -> bool:
    numbers = sorted(map(float, texts))
    if len(texts) < 3 or numbers[0] < 0 or numbers[-1] <= 0 or len(set(part.labels)) < len(texts):
        return False
    span = numbers[-1] - numbers[0] if layout == "line" else numbers[-1]
    gap = 0.0 if layout == "table" else MIN_GAP * span
    if any(high - low <= gap for low, high in pairwise(numbers)):
        return False
    if layout == "pie" and numbers[0] < 0.04 * sum(numbers):
        return False
    room = {"columns": (SIDE_PX - 12) / len(texts) - 2, "line": (SIDE_PX - 36) / (len(texts) - 1) - 2}.get(layout, 96)
    return all(text_width(label, LABEL_PX) <= room for label in part.labels)


def draw(figure: Figure) -> bytes:
    """The chart as a PNG of 192 x 192 pixels."""
    canvas = Canvas(SIDE_PX, figure.background)
    canvas.text((SIDE_PX / 2, 10), figure.series.title, TITLE_PX, INK)
    {"columns": _columns, "bars": _bars, "line": _line, "pie": _pie, "table": _table}[figure.layout](canvas, figure)
    return canvas.png()


def _columns(canvas: Canvas, figure: Figure) -> None:
    base, top = SIDE_PX - 20, 36
    step, largest = (SIDE_PX - 12) / len(figure.texts), max(map(float, figure.texts))
    for place, (label, text) in enumerate(zip(figure.series.labels, figure.texts, strict=True)):
        x, height = 6 + (place + 0.5) * step, (base - top) * float(text) / largest
        canvas.box(round(x - 0.32 * step), round(base - height), round(x + 0.32 * step), base, FILLS[figure.fill])
        canvas.text((x, base + 10), label, LABEL_PX, INK)
        if figure.has_numbers:
            canvas.text((x, base - height - 8), text, 11, INK)
    canvas.line((4, base), (SIDE_PX - 4, base), STRONG)


def _bars(canvas: Canvas, figure: Figure) -> None:
    left = 8 + round(max(text_width(label, LABEL_PX) for label in figure.series.labels))
    widest = max(text_width(text, LABEL_PX) for text in figure.texts)
    room = SIDE_PX - left - (widest + 8 if figure.has_numbers else 8)
    step, largest = (SIDE_PX - 26) / len(figure.texts), max(map(float, figure.texts))
    for place, (label, text) in enumerate(zip(figure.series.labels, figure.texts, strict=True)):
        y, width = 22 + (place + 0.5) * step, room * float(text) / largest
        canvas.box(left, round(y - 0.32 * step), round(left + width), round(y + 0.32 * step), FILLS[figure.fill])
        canvas.text((left - 4, y), label, LABEL_PX, INK, "rm")
        if figure.has_numbers:
            canvas.text((left + width + 4, y), text, LABEL_PX, INK, "lm")
    canvas.line((left, 24), (left, SIDE_PX - 6), STRONG)


def _line(canvas: Canvas, figure: Figure) -> None:
    base, top = SIDE_PX - 22, 40
    numbers = list(map(float, figure.texts))
    low, high = min(numbers), max(numbers)
    step = (SIDE_PX - 36) / (len(numbers) - 1)
    points = [
        (18 + place * step, base - 14 - (base - top - 14) * (n - low) / (high - low)) for place, n in enumerate(numbers)
    ]
    for y in (top, (top + base) / 2, base):
        canvas.line((6, y), (SIDE_PX - 6, y), RULE)
    for start, end in pairwise(points):
        canvas.line(start, end, FILLS[figure.fill], width_px=3)
    for (x, y), label, text in zip(points, figure.series.labels, figure.texts, strict=True):
        canvas.disc((x, y), 4, FILLS[figure.fill])
        canvas.text((x, base + 11), label, LABEL_PX, INK)
        if figure.has_numbers:
            canvas.text((x, y - 11), text, 11, INK)


def _pie(canvas: Canvas, figure: Figure) -> None:
    numbers = list(map(float, figure.texts))
    total, at = sum(numbers), 0.0
    for place, (label, number) in enumerate(zip(figure.series.labels, numbers, strict=True)):
        color, part = FILLS[(figure.fill + place) % len(FILLS)], number / total
        canvas.slice((SIDE_PX / 2, 78), 54, at, at + part, color)
        at += part
        row = 141 + 11 * place if len(numbers) > 4 else 143 + 12 * place
        canvas.box(8, row - 4, 16, row + 4, color)
        words = f"{label}: {figure.texts[place]}" if figure.has_numbers else label
        canvas.text((22, row), words, 11 if len(numbers) > 4 else LABEL_PX, INK, "lm")


def _table(canvas: Canvas, figure: Figure) -> None:
    step = (SIDE_PX - 26) / len(figure.texts)
    for place, (label, text) in enumerate(zip(figure.series.labels, figure.texts, strict=True)):
        y = 22 + (place + 0.5) * step
        canvas.line((6, y - step / 2), (SIDE_PX - 6, y - step / 2), STRONG if place == 0 else RULE)
        canvas.text((12, y), label, 14, INK, "lm")
        canvas.text((SIDE_PX - 12, y), text, 14, INK, "rm")


def _which(figure: Figure) -> str:
    return "When" if figure.series.is_time else "Which"


def _extreme(rng: random.Random, figure: Figure) -> Asked:
    ranked, labels = figure.ranked(), figure.series.labels
    words, place = rng.choice((("largest", ranked[0]), ("smallest", ranked[-1])))
    text = f"When is the value {words}?" if figure.series.is_time else f"Which has the {words} value?"
    return Asked(text, labels[place], tuple(label for label in labels if label != labels[place]))


def _value(rng: random.Random, figure: Figure) -> Asked | None:
    if not figure.has_numbers:
        return None
    place = rng.randrange(len(figure.texts))
    wrong = tuple(text for text in figure.texts if text != figure.texts[place])
    return Asked(f"What is the value of {figure.series.labels[place]}?", figure.texts[place], wrong)


def _label_of(rng: random.Random, figure: Figure) -> Asked | None:
    if not figure.has_numbers:
        return None
    place = rng.randrange(len(figure.texts))
    wrong = tuple(label for label in figure.series.labels if label != figure.series.labels[place])
    return Asked(f"{_which(figure)} is the value {figure.texts[place]}?", figure.series.labels[place], wrong)


def _compare(rng: random.Random, figure: Figure) -> Asked:
    a, b = rng.sample(range(len(figure.texts)), 2)
    is_larger = float(figure.texts[a]) > float(figure.texts[b])
    first, second = figure.series.labels[a], figure.series.labels[b]
    if rng.random() < 0.6:  # by place: the names alone would tell which of two sectors has more jobs
        first, second = _PLACES[a], _PLACES[b]
    return Asked(f"Is the value of {first} larger than that of {second}?", said(is_larger))


def _larger(rng: random.Random, figure: Figure) -> Asked:
    a, b = rng.sample(range(len(figure.texts)), 2)
    first, second = figure.series.labels[a], figure.series.labels[b]
    words = rng.choice(("larger", "smaller"))
    is_first = (float(figure.texts[a]) > float(figure.texts[b])) == (words == "larger")
    return Asked(f"Which is {words}, {first} or {second}?", first if is_first else second)


def _count(rng: random.Random, figure: Figure) -> Asked:
    number = len(figure.texts)
    thing = {"columns": "bars", "bars": "bars", "line": "points", "pie": "slices", "table": "rows"}[figure.layout]
    return Asked(f"How many {thing} are there?", str(number), tuple(str(n) for n in range(2, 9) if n != number))


def _difference(rng: random.Random, figure: Figure) -> Asked | None:
    texts = figure.texts
    if not figure.has_numbers or any("." in text or len(text) > 3 for text in texts):
        return None
    a, b = rng.sample(range(len(texts)), 2)
    if int(texts[a]) < int(texts[b]):
        a, b = b, a
    labels, gap = figure.series.labels, int(texts[a]) - int(texts[b])
    wrong = tuple(str(gap + more) for more in (-10, -2, -1, 1, 2, 10) if gap + more > 0)
    return Asked(f"How much larger is {labels[a]} than {labels[b]}?", str(gap), wrong)


def _trend(rng: random.Random, figure: Figure) -> Asked | None:
    if not figure.series.is_time:
        return None
    first, last = float(figure.texts[0]), float(figure.texts[-1])
    words = rng.choice(("higher", "lower"))
    text = f"Is the last value {words} than the first?"
    return Asked(text, said((last > first) == (words == "higher")))


def _above(rng: random.Random, figure: Figure) -> Asked | None:
    if not figure.has_numbers:
        return None
    limit = rng.choice(figure.texts)
    number = sum(float(text) > float(limit) for text in figure.texts)
    wrong = tuple(str(n) for n in range(len(figure.texts)) if n != number)
    return Asked(f"How many values are above {limit}?", str(number), wrong)


def _kind_of_chart(rng: random.Random, figure: Figure) -> Asked:
    words = {"columns": "bar chart", "bars": "bar chart", "line": "line chart", "pie": "pie chart", "table": "table"}
    return Asked("What kind of figure is this?", words[figure.layout], tuple(sorted(set(words.values()))))


def _title(rng: random.Random, figure: Figure) -> Asked:
    return Asked("What is the title?", figure.series.title)


KINDS: dict[str, Kind[Figure]] = {
    "table_extreme": _extreme,
    "table_value": _value,
    "table_label": _label_of,
    "table_compare": _compare,
    "table_larger": _larger,
    "table_count": _count,
    "table_difference": _difference,
    "table_trend": _trend,
    "table_above": _above,
    "table_figure": _kind_of_chart,
    "table_title": _title,
}


def describe(figure: Figure) -> str:
    """The title, and the labels with their numbers where those are printed, or else from the largest down."""
    words = {"columns": "bar chart", "bars": "bar chart", "line": "line chart", "pie": "pie chart", "table": "table"}
    head = f"A {words[figure.layout]}, {figure.series.title}: "
    labels = figure.series.labels
    if figure.has_numbers:
        return head + ", ".join(f"{label} {text}" for label, text in zip(labels, figure.texts, strict=True)) + "."
    return head + ", ".join(labels) + f"; largest {labels[figure.ranked()[0]]}, smallest {labels[figure.ranked()[-1]]}."
