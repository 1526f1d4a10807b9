"""Plots and a table of what bench_loss.py measured.

    python benchmarks/plot_loss.py        # benchmarks/results/loss*.csv -> docs/images/loss_time.svg, loss_memory.svg

Both plots are logarithmic both ways: supervised tokens against milliseconds, and against gigabytes beyond the inputs.
Colour and shape of a mark are its implementation, the dashes of a line its vocabulary. The files are images of their
own, so they carry their colours, for light and for dark pages. Same rows, same bytes. Rows of one device at a time.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_loss import VOCABULARY
from record import RESULTS, ROOT, Row, read_rows

from grace_vlm.evals.charts import Axis, Frame, element, mark, padded, short
from grace_vlm.evals.palette import svg_file

FILES = (RESULTS / "loss.csv", RESULTS / "loss_scaling.csv")
LABELS = {
    "official": "official GRACE",
    "liger": "Liger (another loss)",
    "ours": "ours",
    "ours_autograd": "ours, autograd",
}
COLORS = {"official": 2, "liger": 1, "ours": 0, "ours_autograd": 5}
"""Class and shape of an implementation; those not named here follow."""
WIDTH, HEIGHT = 760.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 540.0, 40.0, 348.0
STYLE = """
text { font: 12px system-ui, Liberation Sans, Arial, sans-serif; }
.head { font-weight: 600; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.d1 { stroke-dasharray: 7 4; } .d2 { stroke-dasharray: 2 4; } .d3 { stroke-dasharray: 9 3 2 3; }
"""


@dataclass(frozen=True)
class Line:
    """Medians of one implementation at one vocabulary, by tokens."""

    impl: str
    vocabulary: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenAxis(Axis):
    """Ticks at powers of two."""

    def ticks(self, count: int) -> list[float]:
        """Every power of two within the axis, or every second, third ... of many: their texts are short."""
        found = [float(1 << k) for k in range(40) if self.low <= 1 << k <= self.high]
        return found[:: max(1, math.ceil(len(found) / (2 * count)))]


def tokens_tick(value: float) -> str:
    return f"{int(value) // 1024}k" if value >= 1024 and value % 1024 == 0 else short(value)


def place_of_case(case: str) -> tuple[int, int] | None:
    """(tokens, vocabulary) of ``n1024`` and ``n1024_v32768``; None for cases of other widths."""
    found = re.fullmatch(r"n(\d+)(?:_v(\d+))?", case)
    return (int(found[1]), int(found[2] or VOCABULARY)) if found else None


def lines_of(rows: Iterable[Row], metric: str) -> list[Line]:
    """One line per implementation and vocabulary; of a point that stands twice the first row counts."""
    points: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        place = place_of_case(row["case"])
        if row["metric"] == metric and place is not None:
            points.setdefault((row["impl"], place[1]), {}).setdefault(place[0], float(row["p50"]))
    impls = list(indices(impl for impl, _ in points))
    order = sorted(points, key=lambda key: (impls.index(key[0]), key[1]))
    return [Line(impl, words, tuple(sorted(points[impl, words].items()))) for impl, words in order]


def indices(impls: Iterable[str]) -> dict[str, int]:
    """Colour and shape of each implementation, in the order of ``COLORS``, then by name."""
    there = set(impls)
    free = [index for index in range(8) if index not in COLORS.values()]
    others = {name: free[at % len(free)] for at, name in enumerate(sorted(there - set(COLORS)))}
    return {name: index for name, index in {**COLORS, **others}.items() if name in there}


def plot(lines: Sequence[Line], title: str) -> str:
    """An SVG file's text. ``lines`` must not be empty."""
    impls = indices(line.impl for line in lines)
    words = sorted({line.vocabulary for line in lines})
    tokens = [float(at) for line in lines for at, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    x = TokenAxis(*padded(tokens, log=True, share=0.04), LEFT, RIGHT, log=True)
    y = Axis(*padded(values, log=True, share=0.06), BOTTOM, TOP, log=True)
    marks: list[str] = [element("text", title, x=LEFT, y=22.0, class_="head")]
    for line in lines:
        color, dashes = impls[line.impl], words.index(line.vocabulary) % 4
        places = [(x.at(at), y.at(value)) for at, value in line.points]
        dots = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        marks.append(element("polyline", points=dots, class_=f"line d{dashes} c{color}"))
        label = f"{LABELS.get(line.impl, line.impl)}, V = {line.vocabulary:,}"
        marks += [
            mark(left, top, color, f"{label}: {short(value)} at {at:,} tokens")
            for (left, top), (at, value) in zip(places, line.points, strict=True)
        ]
    marks += legend(impls, words)
    chart = Frame(WIDTH, HEIGHT, x, y).draw(title, marks, "supervised tokens (1k = 1,024)", tokens_tick)
    return svg_file(WIDTH, HEIGHT, STYLE, [chart])


def legend(impls: dict[str, int], words: Sequence[int]) -> list[str]:
    """Marks of the implementations, then dashes of the vocabularies, right of the frame."""
    left, top, found = RIGHT + 28, TOP + 12, list[str]()
    for impl, index in impls.items():
        found += [mark(left + 8, top - 4, index), element("text", LABELS.get(impl, impl), x=left + 26, y=top)]
        top += 20
    top += 8
    for number, vocabulary in enumerate(words):
        dashes = f"line d{number % 4}"
        found.append(element("line", x1=left - 8, y1=top - 4, x2=left + 20, y2=top - 4, class_=dashes))
        found.append(element("text", f"V = {vocabulary:,}", x=left + 26, y=top))
        top += 20
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: one row a case of ``loss`` at Qwen3-VL's sizes, medians, what official / ours is, and where.

    A dash is what an implementation has no row for.
    """
    values = {(row["case"], row["impl"], row["metric"]): float(row["p50"]) for row in rows if row["bench"] == "loss"}
    cases = sorted({case for case, _, _ in values if re.fullmatch(r"n\d+", case)}, key=lambda case: int(case[1:]))
    there = {impl for _, impl, _ in values}
    impls = [*(impl for impl in COLORS if impl in there), *sorted(there - set(COLORS))]
    gated = ["ours"] if any(metric == "ms_gate_given" for _, _, metric in values) else []
    heads = ["supervised tokens", *(f"{LABELS.get(impl, impl)}, ms" for impl in impls)]
    heads += [*("ours, gate given, ms" for _ in gated), *(f"{LABELS.get(impl, impl)}, GB" for impl in impls)]
    heads += ["official / ours, time", "memory"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for case in cases:
        keys = [(impl, "ms") for impl in impls] + [(impl, "ms_gate_given") for impl in gated]
        cells = [_cell(values.get((case, *key))) for key in [*keys, *((impl, "extra_gb") for impl in impls)]]
        cells += [_ratio(values, case, "ms"), _ratio(values, case, "extra_gb")]
        lines.append(f"| {int(case[1:]):,} | {' | '.join(cells)} |")
    places = sorted({(row["device"], row["torch"], row["triton"], row["commit"], row["date"]) for row in rows
                     if row["bench"] == "loss" and row["case"] in cases})  # fmt: skip
    where = "; ".join(f"{d}, torch {t}, Triton {r or '-'}, commit {c}, {day}" for d, t, r, c, day in places)
    return "\n".join([*lines, "", where]) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(values: dict[tuple[str, str, str], float], case: str, metric: str) -> str:
    theirs, ours = values.get((case, "official", metric)), values.get((case, "ours", metric))
    return "-" if theirs is None or not ours else f"{theirs / ours:.1f}x"


def main(argv: Sequence[str] | None = None) -> int:
    """Write both plots and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "csv", nargs="*", type=Path, help="default: loss.csv and loss_scaling.csv of benchmarks/results"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder; default: %(default)s")
    args = parser.parse_args(argv)
    rows = [row for file in args.csv or FILES if args.csv or file.exists() for row in read_rows(file)]
    devices = sorted({row["device"] for row in rows})
    if len(devices) != 1:
        print(f"error: rows of {', '.join(devices) or 'no device'}; name files of one device", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for metric, name, title in (
        ("ms", "loss_time.svg", "ms for loss and gradients, both heads included"),
        ("extra_gb", "loss_memory.svg", "GB beyond the inputs at the peak, gradients included"),
    ):
        lines = lines_of(rows, metric)
        if lines:
            (args.out / name).write_text(plot(lines, f"{title}; {devices[0]}"), encoding="utf-8")
        else:
            print(f"no rows of {metric}, so {name} is not written", file=sys.stderr)
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
