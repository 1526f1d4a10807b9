"""Bar charts: three to five bars of different colours and different whole values from 1 to 10 over a ruled axis."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import RULE, SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Rgb

MAX_VALUE = 10
BASE_PX = 120
UNIT_PX = 11
AXIS_PX = 18
STRONG_RULE, INK = (160, 160, 160), (40, 40, 40)


@dataclass(frozen=True)
class Chart:
    """Bars from left to right: (colour, value)."""

    background: Rgb
    bars: tuple[tuple[str, int], ...]
    width_fraction: float


def compose(rng: random.Random) -> Chart:
    """A chart whose values all differ, so that tallest and shortest are unique."""
    num_bars = rng.choice((3, 4, 5))
    colors = rng.sample(sorted(COLORS), num_bars)
    values = rng.sample(range(1, MAX_VALUE + 1), num_bars)
    return Chart(light(rng), tuple(zip(colors, values, strict=True)), rng.uniform(0.6, 0.8))


def draw(chart: Chart) -> bytes:
    """The chart as a PNG of 128 x 128 pixels: a rule at every unit, labelled at 0, 5 and 10."""
    canvas = Canvas(SIDE_PX, chart.background)
    for value in range(MAX_VALUE + 1):
        height = BASE_PX - value * UNIT_PX
        canvas.line((AXIS_PX, height), (SIDE_PX - 1, height), STRONG_RULE if value % 5 == 0 else RULE)
        if value % 5 == 0:
            canvas.text((AXIS_PX / 2, height), str(value), 11, INK)
    step = (SIDE_PX - AXIS_PX - 4) / len(chart.bars)
    for place, (color, value) in enumerate(chart.bars):
        left = AXIS_PX + 2 + (place + 0.5 - chart.width_fraction / 2) * step
        right = left + chart.width_fraction * step
        canvas.box(round(left), BASE_PX - value * UNIT_PX, round(right), BASE_PX, COLORS[color])
    return canvas.png()


def count(chart: Chart) -> list[Candidate]:
    """How many bars."""
    return [("how many bars are there?", str(len(chart.bars)))]


def extreme(chart: Chart) -> list[Candidate]:
    """The colour of the tallest, the shortest and the second tallest bar."""
    ranked = [color for color, _ in sorted(chart.bars, key=lambda bar: -bar[1])]
    words = {"tallest": ranked[0], "second tallest": ranked[1], "shortest": ranked[-1]}
    return [(f"what color is the {word} bar?", color) for word, color in words.items()]


def compare(chart: Chart) -> list[Candidate]:
    """One bar against another."""
    return [
        (f"is the {first} bar taller than the {second} bar?", "yes" if value_1 > value_2 else "no")
        for first, value_1 in chart.bars
        for second, value_2 in chart.bars
        if first != second
    ]


def value(chart: Chart) -> list[Candidate]:
    """The value of one bar, read off the axis."""
    return [(f"what is the value of the {color} bar?", str(value)) for color, value in chart.bars]


def difference(chart: Chart) -> list[Candidate]:
    """How much taller one bar is than another."""
    return [
        (f"how much taller is the {first} bar than the {second} bar?", str(value_1 - value_2))
        for first, value_1 in chart.bars
        for second, value_2 in chart.bars
        if value_1 > value_2
    ]


def describe(chart: Chart) -> str:
    """Every bar with its value, from left to right."""
    return ", ".join(f"{color} {value}" for color, value in chart.bars)


KINDS: Kinds[Chart] = {
    "chart_count": count,
    "chart_max": extreme,
    "chart_compare": compare,
    "chart_value": value,
    "chart_difference": difference,
}
