"""The toy suite's table: every model of a demo, asked the questions of seven benchmarks' layouts.

    grace demo && python benchmarks/toy_suite.py        # runs/demo -> benchmarks/results/toy_suite.csv
    python benchmarks/toy_suite.py --demo runs/demo --models student,grace_w4 --work /tmp/toy --out table.csv

What it does is two commands a model, ``grace data prepare toy-suite`` before them all:

    grace eval MODEL --suite card --data WORK/toy-suite --out WORK/NAME --profile lmms
    the rows of WORK/NAME/scores.json

The profile is ``lmms`` because its prompt is LLaVA's, which the toy bases were trained on: asked as the card's scripts
ask, most of their replies are no letter. HallusionBench has no such profile. Scores are of a toy: they compare models
of the demo with one another, and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from record import RESULTS, ROOT, commit_name

PROFILE = "lmms"
COLUMNS = (
    "model", "label", "task", "metric", "value", "low", "high", "num_scored", "num_total", "unparsed", "profile",
    "commit",
)  # fmt: skip


def grace(*words: object) -> None:
    """A command; its error ends this program."""
    command = [sys.executable, "-m", "grace_vlm.cli.main", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def rows_of(scores: Path, model: str, label: str) -> list[dict[str, object]]:
    """A row a task: its headline."""
    found = []
    for task, report in json.loads(scores.read_text(encoding="utf-8"))["scores"][PROFILE].items():
        metric = report["metrics"][report["headline"]]
        numbers = {name: metric[name] for name in ("value", "low", "high", "num_scored", "num_total")}
        row = {"model": model, "label": label, "task": task, "metric": report["headline"], **numbers}
        found.append(row | {"unparsed": report["num_unparsed"], "profile": PROFILE, "commit": commit_name()})
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo")
    made.add_argument("--models", help="names of rows of the demo's results.json, with commas; default: all")
    made.add_argument("--work", type=Path, default=ROOT / "runs" / "toy-suite")
    made.add_argument("--out", type=Path, default=RESULTS / "toy_suite.csv")
    args = made.parse_args()
    results = args.demo / "results.json"
    if not results.is_file():
        made.error(f"--demo is {args.demo}, which has no results.json; run grace demo first")
    models = json.loads(results.read_text(encoding="utf-8"))["rows"]
    wanted = None if args.models is None else args.models.split(",")
    if wanted is not None and (unknown := set(wanted) - {row["name"] for row in models}):
        made.error(f"--models has {', '.join(sorted(unknown))}; there are {', '.join(row['name'] for row in models)}")
    data = args.work / "toy-suite"
    if not data.exists():
        grace("data", "prepare", "toy-suite", data)
    found: list[dict[str, object]] = []
    for row in models:
        if wanted is None or row["name"] in wanted:
            out = args.work / row["name"]
            folder = (args.demo / row["path"]).resolve()
            grace("eval", folder, "--suite", "card", "--data", data, "--out", out, "--profile", PROFILE, "--resume")
            found += rows_of(out / "scores.json", row["name"], row["label"])
            own = [one for one in found if one["model"] == row["name"]]
            print(row["label"], *(f"{one['task']} {float(str(one['value'])):.3f}" for one in own), flush=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
