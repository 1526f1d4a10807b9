"""``analysis.json`` as SVG files: one picture a question. Same numbers, same bytes.

Each is a file of its own, in light and dark; the page has the same texts inside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from grace_vlm.evals.charts import Axis, Bin, Frame, element, mark, padded, percent_tick, short
from grace_vlm.evals.palette import DARK, LIGHT, svg_file

WIDTH, HEIGHT = 520.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 508.0, 44.0, 276.0
STYLE = """
text { font: 12px system-ui, Liberation Sans, Arial, sans-serif; }
.head { font-weight: 600; font-size: 13px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; }
.bar { stroke-width: 2; stroke-linecap: round; }
"""
Part = Mapping[str, Any]


def _fills(palette: Sequence[str]) -> str:
    """Bars, cells and intervals, which ``palette.colors`` does not know."""
    return "".join(
        f".fill.c{index} {{ fill: {color}; }} .bar.c{index} {{ stroke: {color}; }}\n"
        for index, color in enumerate(palette[3:])
    )


def pictures_of(result: Mapping[str, Any]) -> dict[str, str]:
    """File name -> text of every picture that the numbers allow, in the order of the page."""
    made: dict[str, str | None] = {}
    if result["entropy"]:
        first = result["entropy"]["first"]
        made["entropy.svg"] = error_picture(first["equal_widths"], "of equal widths")
        made["entropy_counts.svg"] = error_picture(first["equal_counts"], "of equal counts")
        made["gate.svg"] = gate_picture(result["gate"])
    if result["cka"]:
        made["cka.svg"] = depth_picture(result["cka"], result["cka_before"])
        made["cka_states.svg"] = states_picture(result["cka"])
    if result["layers"]:
        made["layers.svg"] = layers_picture(result["layers"]["layers"])
        made["effect.svg"] = effect_picture(result["layers"]["layers"])
        if linears := result["layers"].get("linears"):
            made["linears.svg"] = linears_picture(linears)
    for name, part in (result["codes"] or {"schemes": {}})["schemes"].items():
        made[f"codes_{name}.svg"] = codes_picture(name, part)
    return {name: text for name, text in made.items() if text}


def _file(title: str, *children: str) -> str:
    head = element("text", title, x=LEFT, y=24.0, class_="head")
    return svg_file(WIDTH, HEIGHT, STYLE + _fills(LIGHT), [head, *children], _fills(DARK))


def error_picture(part: Part, of_bins: str) -> str | None:
    """The teacher's error rate against its entropy: bins with 95 % Wilson intervals, and the line through them."""
    bins = [Bin(**one) for one in part["bins"]]
    if not bins:
        return None
    x_axis = Axis(0.0, padded([0.0, *(b.mean for b in bins)])[1], LEFT, RIGHT)
    y_axis = Axis(0.0, min(1.0, 1.06 * max(b.high for b in bins)), BOTTOM, TOP)
    marks: list[Markup] = []
    line = part["line"]
    if line["slope"] is not None:
        ends = [(x, line["intercept"] + line["slope"] * x) for x in (bins[0].mean, bins[-1].mean)]
        marks.append(_polyline([(x_axis.at(x), y_axis.at(y)) for x, y in ends], "line dashed"))
    for b in bins:
        x = x_axis.at(b.mean)
        marks.append(_segment(x, y_axis.at(b.high), x, y_axis.at(b.low), "bar c0"))
        said = f"{b.num_wrong} of {b.num} wrong at mean {short(b.mean)} nats"
        marks.append(mark(x, y_axis.at(b.num_wrong / b.num), 0, said))
    fit = "" if line["r_squared"] is None else f", R² {line['r_squared']:.3f}"
    chart = Frame(WIDTH, HEIGHT, x_axis, y_axis).draw(
        "Error rate by entropy", marks, "mean entropy of the bin, nats", short, percent_tick
    )
    return _file(f"Teacher: error rate by entropy, bins {of_bins}{fit}", chart)


def gate_picture(part: Part) -> str | None:
    """How often the gate has which value; the counts' axis is logarithmic, or one bar would be all."""
    counts, edges = part["counts"], part["edges"]
    if not sum(counts):
        return None
    x_axis = Axis(edges[0], edges[-1], LEFT, RIGHT)
    y_axis = Axis(0.5, 1.3 * max(counts), BOTTOM, TOP, log=True)
    bars = [
        _bar(x_axis.at(low), x_axis.at(high), y_axis.at(count), 0, f"{count:,} of gate {low:.3f} to {high:.3f}")
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        if count
    ]
    chart = Frame(WIDTH, HEIGHT, x_axis, y_axis).draw("Gate", bars, "gate exp(−H / log V)", short, _whole)
    return _file(f"Gate of {sum(counts):,} supervised tokens (logarithmic), mean {part['mean']:.3f}", chart)


def depth_picture(after: Part, before: Part | None) -> str | None:
    """CKA with the teacher's state at the same share of the depth, state by state of the student."""
    runs = [("now", 0, after)] + ([("before", 2, before)] if before else [])
    known = [
        (label, i, [(m["student"], m["cka"]) for m in run["matched"] if m["cka"] is not None]) for label, i, run in runs
    ]
    known = [one for one in known if one[2]]
    if not known:
        return None
    values = [cka for _, _, points in known for _, cka in points]
    x_axis = Axis(-0.3, max(state for _, _, points in known for state, _ in points) + 0.3, LEFT, RIGHT)
    low, high = padded(values, share=0.12)
    y_axis = Axis(max(0.0, low), min(1.0, high), BOTTOM, TOP)
    marks = _curves(known, x_axis, y_axis, "state")
    chart = Frame(WIDTH, HEIGHT, x_axis, y_axis).draw("CKA by depth", marks, "state of the student", _whole_or_none)
    return _file("CKA of student and teacher at the same depth", chart, *_legend([(label, i) for label, i, _ in known]))


def states_picture(part: Part) -> str | None:
    """Every state of the student against every state of the teacher, as a grid of tints with their numbers."""
    matrix = part["matrix"]
    if not matrix:
        return None
    values = [value for row in matrix for value in row if value is not None] or [0.0]
    lowest, spread = min(values), (max(values) - min(values)) or 1.0
    cells = _grid(
        [[None if value is None else (value - lowest) / spread for value in row] for row in matrix],
        [[None if value is None else f"{value:.2f}" for value in row] for row in matrix],
        lambda i, j: f"student {i}, teacher {j}: {matrix[i][j]:.3f}",
        [str(i) for i in range(len(matrix))],
        LEFT,
    )
    cells.append(_text((LEFT + RIGHT) / 2, HEIGHT - 8, "state of the teacher; up: state of the student", "middle"))
    return _file(f"CKA of all states, mean of {part['num_pictures']:,} pictures", *cells)


def linears_picture(linears: Sequence[Part]) -> str | None:
    """Effect of each linear alone, layers across and kinds up; tints and numbers are powers of ten."""
    names = list(dict.fromkeys(one["linear"] for one in linears))[::-1]
    found = {(one["linear"], one["layer"]): one for one in linears}
    layers = range(1 + max(one["layer"] for one in linears))
    powers = {place: math.log10(one["kl"]) for place, one in found.items() if one["kl"] > 0}
    if not powers:
        return None
    lowest, spread = min(powers.values()), (max(powers.values()) - min(powers.values())) or 1.0
    rows = [[powers.get((name, layer)) for layer in layers] for name in names]
    cells = _grid(
        [[None if power is None else (power - lowest) / spread for power in row] for row in rows],
        [[None if power is None else f"{power:.1f}" for power in row] for row in rows],
        lambda i, j: f"layer {j}, {names[i]}: KL {short(found[names[i], j]['kl'])} nats",
        [name.rpartition(".")[2] for name in names],
        LEFT + 36,
    )
    cells.append(_text((LEFT + RIGHT) / 2, HEIGHT - 8, "layer", "middle"))
    return _file("One linear quantized at a time: log10 of KL in nats", *cells)


def _grid(
    tints: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str | None]],
    said: Callable[[int, int], str],
    labels: Sequence[str],
    left: float,
) -> list[Markup]:
    """Cells from the bottom up, ``tints`` from 0 to 1, with their numbers where there is room."""
    wide, tall = (RIGHT - left) / len(tints[0]), (BOTTOM - TOP) / len(tints)
    cells: list[Markup] = []
    for i, row in enumerate(tints):
        top = BOTTOM - (i + 1) * tall
        cells.append(_text(left - 8, top + tall / 2 + 4, labels[i], "end"))
        for j, tint in enumerate(row):
            if tint is None:
                continue
            box = {"x": left + j * wide, "y": top, "width": wide, "height": tall}
            opacity = f"{0.06 + 0.5 * tint:.3f}"
            cells.append(element("rect", element("title", said(i, j)), class_="fill c0", fill_opacity=opacity, **box))
            if (text := texts[i][j]) and wide >= 9 * len(text) and tall >= 16:
                cells.append(_text(left + (j + 0.5) * wide, top + tall / 2 + 4, text, "middle"))
    stride = max(1, round(24 / wide))
    cells += [_text(left + (j + 0.5) * wide, BOTTOM + 17, str(j), "middle") for j in range(0, len(tints[0]), stride)]
    return cells


def layers_picture(layers: Sequence[Part]) -> str | None:
    """By layer: how far its weights and its output are off, and the KL of the logits that follows from it alone."""
    kinds = (("weight error", 1, "weight_error"), ("output error", 0, "output_error"), ("effect, KL in nats", 2, "kl"))
    known = [(label, i, [(one["layer"], one[key]) for one in layers if one[key] > 0]) for label, i, key in kinds]
    known = [one for one in known if one[2]]
    if not known:
        return None
    x_axis = Axis(-0.3, len(layers) - 0.7, LEFT, RIGHT)
    y_axis = Axis(*padded([v for _, _, points in known for _, v in points], log=True, share=0.1), BOTTOM, TOP, log=True)
    marks = _curves(known, x_axis, y_axis, "layer")
    chart = Frame(WIDTH, HEIGHT, x_axis, y_axis).draw("Errors by layer", marks, "layer", _whole_or_none)
    return _file("One layer quantized at a time", chart, *_legend([(label, i) for label, i, _ in known]))


def effect_picture(layers: Sequence[Part]) -> str | None:
    """Each layer's output error against its effect on the logits, both logarithmic."""
    points = [(one["output_error"], one["kl"], one["layer"]) for one in layers if one["output_error"] > 0 < one["kl"]]
    if not points:
        return None
    x_axis = Axis(*padded([x for x, _, _ in points], log=True, share=0.1), LEFT, RIGHT, log=True)
    y_axis = Axis(*padded([y for _, y, _ in points], log=True, share=0.1), BOTTOM, TOP, log=True)
    marks: list[Markup] = []
    for x, y, layer in points:
        marks.append(mark(x_axis.at(x), y_axis.at(y), 2, f"layer {layer}: output error {short(x)}, KL {short(y)}"))
        marks.append(_text(x_axis.at(x) + 8, y_axis.at(y) - 6, str(layer), "start"))
    chart = Frame(WIDTH, HEIGHT, x_axis, y_axis).draw("Effect by error", marks, "output error of the layer")
    return _file("Effect on the logits, KL in nats, by output error of a layer", chart)


def codes_picture(name: str, part: Part) -> str | None:
    """How often each code stands in the weights, as a share."""
    counts, first = part["counts"], part["first_code"]
    total = sum(counts)
    if not total:
        return None
    x_axis = Axis(first - 0.5, first + len(counts) - 0.5, LEFT, RIGHT)
    y_axis = Axis(0.0, 1.06 * max(counts) / total, BOTTOM, TOP)
    bars = [
        _bar(x_axis.at(code - 0.45), x_axis.at(code + 0.45), y_axis.at(count / total), 0, f"{count:,} times {code}")
        for code, count in enumerate(counts, start=first)
    ]
    chart = Frame(WIDTH, HEIGHT, x_axis, y_axis).draw("Codes", bars, "code", _whole_or_none, percent_tick)
    return _file(
        f"Codes of {name}: {part['bits_used']:.2f} bits used, {100 * part['share_at_ends']:.1f} % at the ends", chart
    )


def _curves(
    runs: Sequence[tuple[str, int, Sequence[tuple[int, float]]]], x_axis: Axis, y_axis: Axis, what: str
) -> list[Markup]:
    """A line with marks of each run."""
    marks: list[Markup] = []
    for label, index, points in runs:
        places = [(x_axis.at(x), y_axis.at(y)) for x, y in points]
        marks.append(_polyline(places, f"line c{index}"))
        marks += [
            mark(*place, index, f"{label}, {what} {x}: {short(y)}")
            for place, (x, y) in zip(places, points, strict=True)
        ]
    return marks


def _legend(entries: Sequence[tuple[str, int]]) -> list[Markup]:
    """Marks with their labels in one line above the chart, from the right."""
    found: list[Markup] = []
    right = RIGHT
    for label, index in reversed(entries):
        right -= 7.0 * len(label)
        found += [_text(right, TOP - 4, label, "start"), mark(right - 9, TOP - 8, index)]
        right -= 26
    return found


def _polyline(places: Sequence[tuple[float, float]], class_: str) -> Markup:
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=class_)


def _bar(left: float, right: float, top: float, index: int, title: str) -> Markup:
    box = {"x": left, "y": top, "width": right - left, "height": BOTTOM - top}
    return element("rect", element("title", title), class_=f"fill c{index}", **box)


def _segment(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _whole_or_none(value: float) -> str:
    return short(value) if value == int(value) else ""
