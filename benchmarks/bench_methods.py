"""Every method at every width on the toy pair, over seeds: who answers what right.

    python benchmarks/bench_methods.py search     # learning rates, on validation questions
    python benchmarks/bench_methods.py run        # all rows, seeds 0 to 2, on test questions
    python benchmarks/report_methods.py           # docs/results.md from the CSV files

Rows are appended to ``benchmarks/results/methods_<command>.csv`` as they finish; those that are there are not run
again. The recipe is ``recipes/toy_comparison_grace_w2g128.yaml``; a row is that recipe with the overrides below, so all
have the same data, order of rows per seed and number of steps. ``correct`` holds one bit a question, in hexadecimal:
what paired tests need.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path("runs/comparison")
RECIPE = Path("recipes/toy_comparison_grace_w2g128.yaml")
RESULTS = Path("benchmarks/results")
SIZES: dict[str, Any] = {"num_train_images": 1200, "num_val_images": 200, "num_test_images": 340}
FIELDS = (
    "name", "method", "scheme", "seed", "learning_rate", "num_steps", "num_correct", "num_scored", "accuracy",
    "first_cross_entropy", "last_cross_entropy", "first_distillation", "last_distillation", "last_weight", "seconds",
    "hardware", "torch", "transformers", "commit", "correct",
)  # fmt: skip

KEY = ("name", "scheme", "seed", "learning_rate")
"""What tells rows apart: ``Job.key``."""
METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("method=sft", "model.teacher=null"),
    "qat": ("method=qat", "model.teacher=null"),
    "kd": ("method=kd",),
    "kd_gated": ("loss.decoupled=false", "loss.relational=false", "loss.adaptive=false"),
    "grace": (),
    "grace_rate_of_kd": (),
    "grace_relation_in_the_middle": ("loss.relational_layer=-3",),
    "grace_relation_early": ("loss.relational_layer=1",),
    "grace_no_gate": ("loss.gate=false",),
    "grace_no_decoupled": ("loss.decoupled=false",),
    "grace_no_relational": ("loss.relational=false",),
    "grace_no_adaptive": ("loss.adaptive=false",),
}
ROUNDED: dict[str, tuple[Any, Any]] = {
    "rtn_mse": ("rtn", "mse"),
    "rtn_minmax": ("rtn", "minmax"),
    "awq": ("awq", "mse"),
    "gptq": ("gptq", "mse"),
}
"""Rows without training: method and scale rule."""
SEARCHED = {"sft": "bf16", "qat": "w2g128", "kd": "w2g128", "grace": "w2g128"}
"""Methods with a learning rate of their own, and the scheme it is searched at."""
RELATIONS = ("grace_relation_in_the_middle", "grace_relation_early")
"""GRACE with the relations of another layer than the last one's input, beside ``grace_rate_of_kd``."""
BORROWED = {"kd_gated": "kd", "grace_rate_of_kd": "kd", **dict.fromkeys(RELATIONS, "kd")}
"""Whose rate another method takes; those that stand nowhere take that of grace."""
RATES = (1e-4, 3e-4, 1e-3)
ABLATIONS = ("grace_no_gate", "grace_no_decoupled", "grace_no_relational", "grace_no_adaptive")
TRAINED = [
    *[(name, scheme) for scheme in ("w2g128", "w4g128") for name in ("qat", "grace", "kd", "kd_gated")],
    *[(name, "w2g128") for name in ABLATIONS],
    ("sft", "bf16"),
    *[(name, "w3g128") for name in ("qat", "grace", "kd", "kd_gated")],
    ("kd", "bf16"),
    ("grace", "bf16"),
    *[("grace_rate_of_kd", scheme) for scheme in ("w4g128", "w2g128")],
    *[(name, "w2g128") for name in RELATIONS],
]


@dataclass(frozen=True)
class Job:
    """One row: a model as it is, a rounding, or a training run."""

    name: str
    scheme: str
    seed: int | None = None
    learning_rate: float | None = None
    questions: str = "test"

    @property
    def key(self) -> tuple[str, ...]:
        """The row's name, scheme, seed and learning rate as a CSV file has them."""
        parts = (self.name, self.scheme, self.seed, self.learning_rate)
        return tuple("" if part is None else str(part) for part in parts)


def prepare_data() -> None:
    """The toy source in small, and the questions of each split."""
    from grace_vlm.checkpoint.atomic import write_bytes_atomic
    from grace_vlm.data.sources.choose import choose_questions
    from grace_vlm.data.sources.prepare import prepare

    data = ROOT / "data"
    if not data.exists():
        prepare("toy", data, **SIZES)
    for split, num_easy, num_scenes in (("val", 200, 1000), ("test", 400, 2000)):
        questions = data / f"questions_{split}.jsonl"
        if not questions.exists():
            write_bytes_atomic(questions, choose_questions(data / f"{split}.jsonl", num_easy, num_scenes))


def start_worker(queue: Any, num_threads: int) -> None:
    """Give a worker its GPU, if there is one, and its threads; before torch is imported."""
    number, num_gpus = queue.get()
    if num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % num_gpus)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


def run_job(job: Job) -> dict[str, Any]:
    """Make the model of a job and ask it everything."""
    import torch
    import transformers

    from grace_vlm.evals.compare import hardware
    from grace_vlm.evals.run import EXACT, QuestionFile, answer_all, open_engine
    from grace_vlm.models.load import load_model

    started = time.perf_counter()
    recipe = recipe_of(job)
    diary: list[dict[str, Any]] = []
    if job.name in METHODS:
        loaded, diary = _train(job, recipe)
    elif job.name == "teacher":
        loaded = load_model(str(recipe.model.teacher), "auto")
    else:
        loaded = load_model(recipe.model.student, "auto")
        if job.name in ROUNDED:
            _round(loaded, job, recipe)
    questions = QuestionFile(ROOT / "data" / f"questions_{job.questions}.jsonl", loaded)
    # Without codes: every width runs as bf16(q s), as it was trained, whatever kernels there are for it.
    answers = answer_all(open_engine(loaded, {}, questions, replace(EXACT, max_running=256)), questions)
    correct = [answer.correct for answer in answers]
    first, last = (diary[0], diary[-1]) if diary else ({}, {})
    return {
        "name": job.name,
        "method": recipe.method if job.name in METHODS else job.name,
        "scheme": job.scheme,
        "seed": job.key[2],
        "learning_rate": job.key[3],
        "num_steps": recipe.optim.num_steps if diary else "",
        "num_correct": sum(correct),
        "num_scored": len(correct),
        "accuracy": f"{sum(correct) / len(correct):.5f}",
        "first_cross_entropy": first.get("cross_entropy", ""),
        "last_cross_entropy": last.get("cross_entropy", ""),
        "first_distillation": first.get("distillation", ""),
        "last_distillation": last.get("distillation", ""),
        "last_weight": last.get("weight", ""),
        "seconds": f"{time.perf_counter() - started:.1f}",
        "hardware": hardware(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": os.environ.get("GRACE_COMMIT", ""),
        "correct": f"{int(''.join('1' if flag else '0' for flag in correct), 2):x}",
    }


def recipe_of(job: Job) -> Any:
    """The recipe of a training row; for the others the recipe that names their models."""
    from grace_vlm.train.config import load_recipe

    if job.name not in METHODS:
        return load_recipe(RECIPE)
    assert job.learning_rate is not None
    overrides = [
        *METHODS[job.name],
        f"scheme={job.scheme}",
        f"runtime.seed={job.seed}",
        f"optim.learning_rate={job.learning_rate}",
        # Ten times the rate of the weights, as in the recipe.
        f"optim.scale_learning_rate={10 * job.learning_rate}",
    ]
    return load_recipe(RECIPE, overrides)


def _train(job: Job, recipe: Any) -> tuple[Any, list[dict[str, Any]]]:
    from grace_vlm.models.load import load_model
    from grace_vlm.train.loop import train
    from grace_vlm.train.record import read_metrics

    out = ROOT / "runs" / "_".join(part for part in job.key if part)
    final = train(recipe, out, overwrite=True)
    loaded = load_model(str(final), "auto")
    diary = read_metrics(out / "metrics.jsonl")
    shutil.rmtree(out)
    return loaded, diary


def _round(loaded: Any, job: Job, recipe: Any) -> None:
    """RTN, AWQ or GPTQ in place, calibrated on rows of the training file."""
    from grace_vlm.models.adapter import plan_model
    from grace_vlm.ptq.calibration import Calibration, calibration_entries, calibration_replay
    from grace_vlm.ptq.layers import quantize_layers
    from grace_vlm.ptq.rtn import round_to_nearest

    method, rule = ROUNDED[job.name]
    plan = plan_model(loaded.model, loaded.adapter, job.scheme)
    if method == "rtn":
        round_to_nearest(loaded.model, plan, rule)
        return
    dtype = loaded.model.dtype
    loaded.model.float()
    entries = calibration_entries(loaded, Calibration(Path(recipe.data.train)))
    quantize_layers(loaded.model, plan.schemes, calibration_replay(loaded, entries), method, rule)
    loaded.model.to(dtype)


def search_jobs() -> list[Job]:
    """Learning rates of each method, seed 0."""
    return [Job(name, scheme, 0, rate, "val") for name, scheme in SEARCHED.items() for rate in RATES]


def all_jobs(rates: dict[str, float]) -> list[Job]:
    """Every row of the comparison, the most wanted first."""
    jobs = [Job("teacher", "bf16"), Job("student", "bf16")]
    jobs += [Job(name, f"w{bits}g128") for bits in (8, 4, 3, 2) for name in ROUNDED]
    for seed in (0, 1, 2):
        for name, scheme in TRAINED:
            method = name if name in SEARCHED else BORROWED.get(name, "grace")
            jobs.append(Job(name, scheme, seed, rates[method]))
    return jobs


def best_rates() -> dict[str, float]:
    """Of each searched method the rate with the most right answers (``search`` made the file)."""
    rows = read_rows(RESULTS / "methods_search.csv")
    best: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["name"] not in best or int(row["num_correct"]) > int(best[row["name"]]["num_correct"]):
            best[row["name"]] = row
    missing = SEARCHED.keys() - best.keys()
    if missing:
        sys.exit(f"no learning rate of {', '.join(sorted(missing))}; run: python benchmarks/bench_methods.py search")
    return {name: float(row["learning_rate"]) for name, row in best.items()}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_all(jobs: list[Job], path: Path, workers: int, num_gpus: int, deadline: float) -> None:
    """Run the jobs that ``path`` lacks, appending each row as it comes; none is begun after ``deadline`` seconds."""
    done = {tuple(row[field] for field in KEY) for row in read_rows(path)}
    left = [job for job in jobs if job.key not in done]
    print(f"{len(left)} of {len(jobs)} rows to make, {workers} at a time", flush=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for number in range(workers):
        queue.put((number, num_gpus))
    threads = max(1, (os.cpu_count() or 1) // workers)
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with (
        path.open("a", newline="") as file,
        ProcessPoolExecutor(workers, context, start_worker, (queue, min(threads, 4))) as pool,
    ):
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        waiting = iter(left)
        running = {pool.submit(run_job, job) for job in itertools.islice(waiting, workers)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            elapsed = time.monotonic() - started
            for future in finished:
                row = future.result()
                writer.writerow(row)
                file.flush()
                shown = [str(row[field]) for field in (*KEY, "accuracy", "seconds")]
                print(f"[{elapsed:6.0f} s]", *shown, flush=True)
            if elapsed < deadline:
                running |= {pool.submit(run_job, job) for job in itertools.islice(waiting, len(finished))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("search", "run"))
    parser.add_argument("--workers", type=int, default=2, help="processes; with GPUs they are dealt out in turn")
    parser.add_argument("--gpus", type=int, default=0, help="how many GPUs to use; 0: CPU")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    if not args.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "GRACE_COMMIT" not in os.environ:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        os.environ["GRACE_COMMIT"] = head.stdout.strip()
    prepare_data()
    jobs = search_jobs() if args.command == "search" else all_jobs(best_rates())
    run_all(jobs, args.out / f"methods_{args.command}.csv", args.workers, args.gpus, args.deadline)


if __name__ == "__main__":
    main()
