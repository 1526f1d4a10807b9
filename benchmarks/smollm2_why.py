"""Where four bits hurt the SmolLM2 student, and what GRACE does about it: ``grace analyze`` of one run that is kept.

    python benchmarks/smollm2.py search && python benchmarks/smollm2_why.py    # -> benchmarks/results/smollm2/why.json

``runs/smollm2/grace`` is GRACE at W4 g64 with its searched rate, seed 0: the headline's first row once more, with its
weights. Beside it the student rounded to nearest (min-max scales), of which single linears say something, too. Rows are
held-out questions. ``report_smollm2.py`` makes numbers and pictures of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import commit_name
from smollm2 import WORLD, run
from smollm2_jobs import RUNS, SCHEME, Job, recipe_of, searched_rates
from smollm2_rows import OUT
from smollm2_table import digest_of

from grace_vlm.checkpoint.atomic import write_json_atomic

KEPT, ROUNDED = RUNS / "grace", RUNS / "rtn_minmax"
KEPT_OF = KEPT / "student.txt"
"""The hash of the student that it went on from."""


def analysis_of(model: Path, teacher: str | None, before: str, args: argparse.Namespace, linears: bool) -> Any:
    """The content of ``analysis.json``, without the codes of every linear."""
    from grace_vlm.evals.why.analysis import Analysis
    from grace_vlm.evals.why.rows import Sampled

    sampled = Sampled(args.data, None, args.limit, 0, None)

    def say(done: int, total: int) -> None:
        print(f"  {model.name}: {done} of {total} rows", flush=True)

    found = Analysis(str(model), teacher, before, sampled, args.device, linears).run(say)
    del found["codes"]["linears"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("overrides", nargs="*", help="key=value of the recipe")
    made.add_argument("--data", type=Path, default=WORLD / "test.jsonl", help="default: %(default)s")
    made.add_argument("--limit", type=int, default=2400, help="rows to look at; default: %(default)s")
    made.add_argument("--kept", action="store_true", help=f"look at the GRACE model in {KEPT}, and train none")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda")
    made.add_argument("--out", type=Path, default=OUT, help="folder of the rows; default: %(default)s")
    args = made.parse_intermixed_args(argv)

    from grace_vlm.ptq.quantize import quantize_folder
    from grace_vlm.train.loop import train

    recipe = recipe_of(Job("grace", seed=0, rate=1.0), args.overrides)
    student, teacher = str(recipe.model.student), str(recipe.model.teacher)
    digest = digest_of(student)
    rates = searched_rates(args.out / "search.jsonl", digest)
    if args.kept:
        if not KEPT_OF.is_file() or KEPT_OF.read_text().strip() != digest:
            made.error(f"{KEPT} holds no GRACE model of the student {student}; leave out --kept to train one")
    else:  # what is there may be of another student, or unfinished
        KEPT_OF.unlink(missing_ok=True)
        train(recipe_of(Job("grace", seed=0, rate=rates["grace"]), args.overrides), KEPT, overwrite=True, notify=print)
        KEPT_OF.write_text(f"{digest}\n")
    quantize_folder(student, ROUNDED, SCHEME, scale="minmax", overwrite=True)
    content = {
        "student": digest,
        "weights": digest_of(str(KEPT)),
        "commit": commit_name(),
        "grace": analysis_of(KEPT, teacher, student, args, linears=False),
        "rtn_minmax": analysis_of(ROUNDED, None, student, args, linears=True),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(args.out / "why.json", content)
    print(f"wrote {args.out / 'why.json'}")


if __name__ == "__main__":
    run(main)
