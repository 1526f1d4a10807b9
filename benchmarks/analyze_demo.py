"""Why the demo's quantized students are as good as they are: ``grace analyze`` of several, in one file.

    grace demo && python benchmarks/analyze_demo.py        # runs/demo -> benchmarks/results/analyze.json, docs/images

Of the first model everything is kept, with its pictures; of the others what a table compares: each layer's errors and
effects, CKA with the teacher, and the codes. All on the demo's held-out questions, against the student that they were
quantized from and its teacher.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, commit_name

MODELS = "grace_w4,rtn_w4,awq_w4,gptq_w4,rtn_w2"
KEPT = ("layers", "cka", "cka_before", "codes")


def analysis_of(demo: Path, model: str, out: Path, limit: int) -> dict[str, Any]:
    """What ``grace analyze`` writes, or wrote into ``out`` before; paths are as they stand below the demo's folder."""
    if (out / "analysis.json").is_file():
        before: dict[str, Any] = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
        if before["data"]["num_rows"] == limit and before["models"]["model"] == model:
            return before
    words = [model, "--teacher", "teacher", "--before", "student", "--data", "data/questions.jsonl"]
    command = [sys.executable, "-m", "grace_vlm.cli.main", "analyze", *words, "--out", str(out), "--limit", str(limit)]
    subprocess.run(command, check=True, cwd=demo, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo")
    made.add_argument("--models", default=MODELS, help="folders of the demo, with commas; default: %(default)s")
    made.add_argument("--limit", type=int, default=2400, help="questions of the first; default: %(default)s")
    made.add_argument("--limit-others", type=int, default=400, help="of the others; default: %(default)s")
    made.add_argument("--work", type=Path, default=ROOT / "runs" / "why", help="kept; remove it after a change")
    made.add_argument("--out", type=Path, default=RESULTS / "analyze.json")
    args = made.parse_args()
    if not (args.demo / "results.json").is_file():
        made.error(f"--demo is {args.demo}, which has no results.json; run grace demo first")
    first, *others = args.models.split(",")
    labels = {row["path"]: row["label"] for row in json.loads((args.demo / "results.json").read_text())["rows"]}
    content: dict[str, Any] = {
        "commit": commit_name(),
        "labels": labels,
        "first": first,
        "whole": {},
        "num_rows_others": args.limit_others,
        "others": {},
    }
    for name in (first, *others):
        limit = args.limit if name == first else args.limit_others
        found = analysis_of(args.demo, name, (args.work / name).absolute(), limit)
        del found["codes"]["linears"]
        if name == first:
            content["whole"] = found
        else:
            content["others"][name] = {part: found[part] for part in KEPT}
        print(name, f"{found['layers']['whole']['kl']:.3e}", flush=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
