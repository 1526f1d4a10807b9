"""Rows made again, beside those of docs/results.md: means with their intervals, and the p of "they are alike".

    python benchmarks/smollm2_again.py FOLDER     # of smollm2.py --out FOLDER

On a GPU of the same kind, with the same versions, student and teacher, trained weights repeat to the bit, and what is
the same is shown so; trained rows without ``weights`` are older, and did not repeat. Else two sets of seeds are two
samples (Welch), and a new mean outside an old interval happens to one in eight without any change.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from smollm2_jobs import OTHER_RULES, ROUNDED, SCHEME, SEARCHED
from smollm2_rows import LANGUAGE_OUT, OUT
from smollm2_runs import LABELS, Runs, cell, collect, made_with, recovered, scheme_of, table_of, values
from smollm2_units import Measure, Row, test_right, text_loss

from grace_vlm.evals.statistics import holm
from grace_vlm.evals.student_t import t_interval, welch

SHOWN: tuple[tuple[str, Measure, Callable[[float], float]], ...] = (
    ("questions", test_right, float),
    ("perplexity", text_loss, math.exp),
)
"""Title, measure, and what turns it into what is shown."""


def again_table(first: Runs, again: Runs, scheme: str, names: Sequence[str]) -> list[str]:
    """A line for each method that both have; p is adjusted for all of them."""
    own = [(name, (name, scheme_of(name, scheme))) for name in names]
    own = [(name, key) for name, key in own if key in first and key in again]
    if not own:
        return []
    same = [is_same(first[key], again[key]) for _, key in own]
    tested = [
        [math.nan if alike else welch(*(values(runs, key, one) for runs in (first, again)))[2] for _, one, _ in SHOWN]
        for alike, (_, key) in zip(same, own, strict=True)
    ]
    adjusted = iter(holm([p for line in tested for p in line if not math.isnan(p)]))
    titles = [f"{title}{what}" for title, _, _ in SHOWN for what in (", first", ", again", " given back", ": p, Holm")]
    lines: list[list[str]] = []
    for (name, key), ps_of, alike in zip(own, tested, same, strict=True):
        cells: list[str] = []
        for (_, measure, shown), p in zip(SHOWN, ps_of, strict=True):
            back = "" if key[1] == "bf16" or alike else recovered(again, name, scheme, measure)
            ps = "" if math.isnan(p) else f"{p:.2g}, {next(adjusted):.2g}"
            old, new = (_shown([shown(value) for value in values(runs, key, measure)]) for runs in (first, again))
            cells += [old, same_of(first[key], again[key]) if new and alike else new, back, ps]
        lines.append([LABELS[name], *cells])
    return table_of((scheme.upper(), *titles), lines)


def _shown(numbers: Sequence[float]) -> str:
    """The mean, with its interval over seeds."""
    low, high = t_interval(numbers)
    return cell(numbers) if math.isnan(low) else f"{statistics.mean(numbers):.2f} [{low:.2f}, {high:.2f}]"


def same_of(first: dict[int | None, Row], again: dict[int | None, Row]) -> str:
    """What is said of models that are the same."""
    return "the same" if len(again) == len(first) else f"the same, {len(again)} of {len(first)} seeds"


def is_same(first: dict[int | None, Row], again: dict[int | None, Row]) -> bool:
    """Whether a method's models have the weights of the first ones of the same seeds, where those are noted, and all
    that was found out of them, question by question and window by window."""
    parts = ("weights", "suite", "questions", "texts")
    return again.keys() <= first.keys() and all(
        first[seed][part] == row[part]
        for seed, row in again.items()
        for part in parts
        if part in first[seed] and part in row
    )


FILES = ("headline.jsonl", f"{LANGUAGE_OUT.name}/headline.jsonl", "small.jsonl")


def tables(folder: Path, shipped: Path = OUT) -> list[str]:
    """Lines for every file of ``FILES`` that a folder has."""
    lines: list[str] = []
    for name in FILES:
        first, before = collect([shipped / name])
        again, rows = collect([folder / name])
        if before and rows:
            same = "the same student" if before[0]["student"] == rows[0]["student"] else "another student"
            table = again_table(first, again, SCHEME, ("teacher", "student", *ROUNDED, *OTHER_RULES, *SEARCHED))
            lines += [f"{folder / name}, of {same}, beside {shipped / name}", ""]
            if (here := made_with(rows)) != (there := made_with(before)):
                lines += [f"made on {here}; those on {there}: intervals and not bits are to be compared", ""]
            lines += [*table, ""]
    return lines


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="of rows, as in smollm2.py --out FOLDER")
    folder = made.parse_args().folder
    if not folder.is_dir():
        made.error(f"{folder} is no folder; expected one of rows, as in smollm2.py --out FOLDER")
    print("\n".join(tables(folder) or [f"no rows in {folder} yet that docs/results.md has, too"]))


if __name__ == "__main__":
    main()
