"""Rows of the SmolLM2 comparison by method and seed, and what of them is shown: means, shares given back, times."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from smollm2_rows import read_rows
from smollm2_units import Measure, share_interval

from grace_vlm.evals.student_t import t_interval

LABELS = {
    "teacher": "teacher, BF16",
    "student": "student, BF16",
    "sft": "student, fine-tuned as long, BF16",
    "rtn_minmax": "RTN, min-max scales",
    "rtn": "RTN, MSE scales",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "block": "block reconstruction",
    "awq_mse": "AWQ, least error scales",
    "gptq_mse": "GPTQ, MSE scales",
    "rtn_signed": "RTN, signed scales",
    "awq_signed": "AWQ, signed scales",
    "gptq_signed": "GPTQ, signed scales",
    "block_signed": "block reconstruction, signed scales",
    "qat": "QAT",
    "kd": "QAT with plain distillation",
    "grace": "GRACE",
    "grace_no_gate": "GRACE without the gate",
    "grace_no_decoupled": "GRACE without decoupling",
    "grace_no_relational": "GRACE without relations",
    "grace_no_adaptive": "GRACE without the adaptive weight",
}

Runs = dict[tuple[str, str], dict[int | None, dict[str, Any]]]
"""(name, scheme) -> seed -> row."""


def collect(paths: Sequence[Path]) -> tuple[Runs, list[dict[str, Any]]]:
    """Rows of the student that the last row of the last file belongs to.

    A method has one rate: rows of another one, from before a search was made anew, are an error.
    """
    rows = [row for path in paths for row in read_rows(path)]
    if not rows:
        return {}, []
    own = [row for row in rows if row["student"] == rows[-1]["student"]]
    runs: Runs = {}
    for row in own:
        seeds = runs.setdefault((row["name"], row["scheme"]), {})
        if row["seed"] in seeds or any(other["rate"] != row["rate"] for other in seeds.values()):
            sys.exit(f"{row['name']} {row['scheme']} has two rates or a seed twice; remove the older rows")
        if any(other.get("teacher") != row.get("teacher") for other in seeds.values()):
            sys.exit(f"{row['name']} {row['scheme']} has rows of two teachers; give each a folder of its own (--out)")
        seeds[row["seed"]] = row
    return runs, own


def collect_all(folder: Path) -> tuple[Runs, list[dict[str, Any]]]:
    """Of the headline's student, what other commands made, too."""
    return collect([folder / f"{name}.jsonl" for name in ("others", "variants", "headline")])


def values(runs: Runs, key: tuple[str, str], measure: Measure) -> list[float]:
    found = [measure(row) for row in runs.get(key, {}).values()]
    return [value for value in found if value is not None]


def cell(numbers: Sequence[float], digits: int = 2, of: Callable[[float], float] = float) -> str:
    """Mean and, of several seeds, standard deviation."""
    if not numbers:
        return ""
    shown = [of(number) for number in numbers]
    spread = f" ± {statistics.stdev(shown):.{digits}f}" if len(shown) > 1 else ""
    return f"{statistics.mean(shown):.{digits}f}{spread}"


def table_of(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown without the columns that nobody fills; nothing of no lines."""
    kept = [column for column in range(len(head)) if any(line[column] for line in lines)]
    rows = ([head[column] for column in kept], ["---"] * len(kept), *([line[c] for c in kept] for line in lines))
    return ["| " + " | ".join(row) + " |" for row in rows] if lines else []


def scheme_of(name: str, scheme: str) -> str:
    return "bf16" if name in ("teacher", "student", "sft") else scheme


def is_untrained(rows: dict[int | None, Any]) -> bool:
    """Whether rows of a method have no seed."""
    return set(rows) == {None}


def recovered(runs: Runs, name: str, scheme: str, measure: Measure) -> str:
    """What share of the loss of RTN a method gives back, with its interval; nothing of a loss that is less than a
    hundredth."""
    keys = ("student", "bf16"), ("rtn_minmax", scheme), (name, scheme)
    whole, lost, own = (values(runs, key, measure) for key in keys)
    if not (whole and lost and own) or abs(whole[0] - lost[0]) < 0.01 * abs(whole[0]):
        return ""
    shares = [100 * (value - lost[0]) / (whole[0] - lost[0]) for value in own]
    if name != "rtn_minmax" and is_untrained(runs[keys[2]]):
        good, bad, mine = (runs[key][None] for key in keys)
        low, high = share_interval(good, bad, mine, measure)
    else:
        low, high = t_interval(shares)
    return f"{statistics.mean(shares):.0f} %" + ("" if math.isnan(low) else f" [{low:.0f}, {high:.0f}]")


def was_beside(row: dict[str, Any]) -> bool:
    """Whether other rows were made on the same GPU meanwhile: its time says nothing of its method."""
    return bool(row.get("beside", 0))


def least_seconds(rows: Iterable[dict[str, Any]]) -> str:
    """To make a row's model, of rows that had the GPU for themselves: one of a process compiled for all."""
    seconds = [row["made_seconds"] for row in rows if not was_beside(row)]
    return f"{min(seconds):.0f}" if seconds else ""


def made_with(rows: Sequence[dict[str, Any]]) -> str:
    """On what rows were made, and with which versions."""
    found = {f"{row['device']}, torch {row['torch']}, transformers {row['transformers']}" for row in rows}
    return "; ".join(sorted(found))


def provenance(rows: Sequence[dict[str, Any]]) -> str:
    commits = sorted({row["commit"] for row in rows})
    minutes = minutes_of(rows)
    shared = " (those of rows that shared a GPU divided by their number)" if any(map(was_beside, rows)) else ""
    teachers = sorted({row["teacher"] for row in rows if row.get("teacher")})
    taught = f" under the teacher `{', '.join(teachers)}`" if teachers else ""
    return (
        f"{len(rows)} rows, {minutes:.0f} minutes in all{shared}, for the student `{rows[0]['student']}`{taught}. "
        f"{made_with(rows)}. Commits {', '.join(commits)}."
    )


def minutes_of(rows: Iterable[dict[str, Any]]) -> float:
    """Of GPUs; rows that shared one have their share of it."""
    return sum(row["seconds"] / (1 + row.get("beside", 0)) for row in rows) / 60
