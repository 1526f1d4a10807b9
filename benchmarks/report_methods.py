"""docs/results.md: the tables of the comparison, from the CSV that bench_methods.py wrote.

    python benchmarks/report_methods.py

Only what stands between the two marks of the page is written; what is said about it is written by hand. A difference
of two methods is the mean over questions of the difference of their shares of right answers (over seeds). Its interval
treats the pictures as drawn at random (several questions share one), by the cluster-robust normal approximation; it
does not cover the draw of the seeds, so the differences of the single seeds stand beside it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from bench_methods import RELATIONS, RESULTS, ROOT, prepare_data, read_rows

PAGE = Path("docs/results.md")
BEGIN, END = "<!-- tables:begin (benchmarks/report_methods.py) -->", "<!-- tables:end -->"
SCHEMES = ("bf16", "w8g128", "w4g128", "w3g128", "w2g128")
LABELS = {
    "teacher": "teacher", "student": "student",
    "rtn_minmax": "RTN, min-max scales", "rtn_mse": "RTN, MSE scales",
    "awq": "AWQ, MSE scales", "gptq": "GPTQ, MSE scales",
    "sft": "fine-tuning only", "qat": "QAT only",
    "kd": "distillation, plain KL", "kd_gated": "distillation, gated KL", "grace": "GRACE",
    "grace_rate_of_kd": "GRACE at the rate of plain KL",
    "grace_relation_in_the_middle": "GRACE at that rate, relations in the middle",
    "grace_relation_early": "GRACE at that rate, relations early",
    "grace_no_gate": "GRACE without the gate", "grace_no_decoupled": "GRACE without decoupling",
    "grace_no_relational": "GRACE without relations", "grace_no_adaptive": "GRACE without the adaptive weight",
}  # fmt: skip
PAIRS = (
    ("teacher", "student", "bf16"),
    *((name, "sft", "bf16") for name in ("kd", "grace")),
    *((name, other, scheme) for scheme in SCHEMES[2:] for name, other in (
        ("awq", "rtn_mse"), ("gptq", "rtn_mse"), ("qat", "gptq"),
        ("qat", "rtn_mse"), ("grace", "rtn_mse"), ("grace", "qat"), ("grace", "kd"), ("kd", "qat"), ("kd_gated", "kd"),
    )),
    *(("grace_rate_of_kd", other, scheme) for scheme in ("w4g128", "w2g128") for other in ("grace", "qat", "kd")),
    *((name, "grace_rate_of_kd", "w2g128") for name in RELATIONS),
    *(("grace", f"grace_no_{part}", "w2g128") for part in ("gate", "decoupled", "relational", "adaptive")),
)  # fmt: skip

Outcomes = dict[tuple[str, str], dict[str, list[int]]]
"""(name, scheme) -> seed -> one 0 or 1 a question."""


def load_outcomes(rows: list[dict[str, str]]) -> Outcomes:
    """The bits of every row; a row that stands there twice (at two learning rates) is an error."""
    outcomes: Outcomes = defaultdict(dict)
    for row in rows:
        if row["seed"] in outcomes[row["name"], row["scheme"]]:
            sys.exit(f"{row['name']} {row['scheme']} seed {row['seed']} stands in the CSV twice; remove the older row")
        bits = bin(int(row["correct"], 16))[2:].zfill(int(row["num_scored"]))
        outcomes[row["name"], row["scheme"]][row["seed"]] = [int(bit) for bit in bits]
    return outcomes


def common_seeds(
    first: dict[str, list[int]], second: dict[str, list[int]]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Both with the seeds that both have; what was not trained has none and stands beside each seed of the other."""
    both = (first, second)
    seeds = sorted(seed for seed in first.keys() | second.keys() if all(seed in runs or "" in runs for runs in both))
    one, two = ({seed: runs[seed] if seed in runs else runs[""] for seed in seeds} for runs in both)
    return one, two


def accuracies(runs: dict[str, list[int]]) -> list[float]:
    """Per cent right, seed by seed."""
    return [100 * statistics.mean(bits) for _, bits in sorted(runs.items())]


def difference(
    first: dict[str, list[int]], second: dict[str, list[int]], pictures: list[str]
) -> tuple[float, float, float]:
    """(mean difference, half width of its 95 % interval, two-sided p), in points; clusters are pictures."""
    n = len(pictures)
    one, two = ([statistics.mean(column) for column in zip(*runs.values(), strict=True)] for runs in (first, second))
    deltas = [a - b for a, b in zip(one, two, strict=True)]
    mean = statistics.mean(deltas)
    clusters: dict[str, float] = defaultdict(float)
    for picture, delta in zip(pictures, deltas, strict=True):
        clusters[picture] += delta - mean
    error = math.sqrt(len(clusters) / (len(clusters) - 1) * sum(total**2 for total in clusters.values())) / n
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else 1.0
    return 100 * mean, 196 * error, p


def accuracy_table(outcomes: Outcomes) -> list[str]:
    """Methods by schemes: mean and standard deviation over the seeds."""
    lines = ["| accuracy % | " + " | ".join(s.removesuffix("g128").upper() for s in SCHEMES) + " |", "|---" * 6 + "|"]
    for name, label in LABELS.items():
        cells = []
        for scheme in SCHEMES:
            runs = outcomes.get((name, scheme))
            if not runs:
                cells.append("")
                continue
            values = accuracies(runs)
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def pair_table(outcomes: Outcomes, pictures: list[str]) -> list[str]:
    """Paired differences, with each seed's own."""
    lines = ["| at | difference of | points [95 %] | p | by seed |", "|---|---|---|---|---|"]
    for name, other, scheme in PAIRS:
        first, second = outcomes.get((name, scheme)), outcomes.get((other, scheme))
        if not first or not second:
            continue
        first, second = common_seeds(first, second)
        if not first:
            continue
        mean, half, p = difference(first, second, pictures)
        own, theirs = accuracies(first), accuracies(second)
        by_seed = ", ".join(f"{a - b:+.2f}" for a, b in zip(own, theirs, strict=True)) if len(own) > 1 else ""
        lines.append(
            f"| {scheme.removesuffix('g128').upper()} | {LABELS[name]} - {LABELS[other]} "
            f"| {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] | {p:.3g} | {by_seed} |"
        )
    return lines


def search_table(rows: list[dict[str, str]]) -> list[str]:
    """Learning rates on validation questions."""
    lines = ["| method | scheme | rate of the weights | right of " + rows[0]["num_scored"] + " |", "|---|---|---|---|"]
    order = list(LABELS)
    rows = sorted(rows, key=lambda row: (order.index(row["name"]), float(row["learning_rate"])))
    lines.extend(
        f"| {LABELS[row['name']]} | {row['scheme']} | {row['learning_rate']} | {row['num_correct']} |" for row in rows
    )
    return lines


def machines(rows: list[dict[str, str]]) -> str:
    """What rows were measured on, each machine once."""
    return "; ".join(
        sorted({f"{row['hardware']}, torch {row['torch']}, transformers {row['transformers']}" for row in rows})
    )


def main() -> None:
    prepare_data()
    questions = (ROOT / "data" / "questions_test.jsonl").read_text().splitlines()
    pictures = [json.loads(line)["image"] for line in questions]
    rows, searched = read_rows(RESULTS / "methods_run.csv"), read_rows(RESULTS / "methods_search.csv")
    outcomes = load_outcomes(rows)
    text = "\n".join(
        [
            BEGIN,
            f"{len(rows)} rows; {len(pictures)} questions about {len(set(pictures))} held-out pictures. "
            f"Rows: {machines(rows)}. Search: {machines(searched)}.",
            "",
            *accuracy_table(outcomes),
            "",
            "Mean ± standard deviation over seeds 0, 1, 2 where there is one.",
            "",
            "Paired differences on the same questions:",
            "",
            *pair_table(outcomes, pictures),
            "",
            "Learning-rate search (seed 0, other questions):",
            "",
            *search_table(searched),
            END,
        ]
    )
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    PAGE.write_text(head + text + rest.split(END)[1], encoding="utf-8")
    print(f"{PAGE}: {len(rows)} rows")


if __name__ == "__main__":
    main()
