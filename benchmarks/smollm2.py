"""Proof on pretrained weights: SmolLM2 with a small tower, where four bits hurt, and what each method gives back.

    python benchmarks/smollm2.py data             # runs/world and runs/text as one file to train on
    python benchmarks/smollm2.py teacher          # recipes/smollm2/teacher_*.yaml
    python benchmarks/smollm2.py student          # recipes/smollm2/student.yaml
    python benchmarks/smollm2.py search           # a learning rate for each trained method
    python benchmarks/smollm2.py headline         # every method at W4 g64, five seeds
    python benchmarks/smollm2.py others           # W8, W3, W4 g32; GRACE without each part; BF16, trained as long
    python benchmarks/smollm2.py variants         # what might be better than GRACE as published
    python benchmarks/smollm2.py small            # language alone, one seed, on two CPU cores
    python benchmarks/report_smollm2.py           # docs/results.md from what they left

``--language`` makes the rows of search, headline, others and variants of the language alone, without a GPU: SmolLM2
is student and teacher, a row is two or three minutes of two cores.

Each ends after ``--minutes`` with what was finished, and exit code 3 if some is left: the same command goes on, on
another day or machine. ``--gpus N`` makes rows on N at once, each with its share of them; a stage of N processes
(torchrun) shares out its batches, and sums in another order than one. Rows are lines of
``benchmarks/results/smollm2/<command>.jsonl`` with every answer's score, and the hash of the student they belong to:
rows of another student are left out, never mixed.

All trained rows have the same data, order of rows per seed and number of steps (``recipes/smollm2/comparison.yaml``);
they differ by the overrides below.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from record import RESULTS, commit_name, device_name

from grace_vlm.checkpoint.atomic import write_bytes_atomic

RUNS, RECIPES = Path("runs/smollm2"), Path("recipes/smollm2")
WORLD, TEXT, SUITE = Path("runs/world"), Path("runs/text"), Path("runs/toy-suite")
OUT = RESULTS / "smollm2"
LANGUAGE_OUT = OUT / "language"
ROWS = RUNS / "train.jsonl"
SMALL = (
    f"data.train={TEXT / 'train.jsonl'}",
    "data.root=null",
    "data.micro_batch_size=4",
    "data.workers=0",
    "data.group_by_length=false",
    "optim.num_steps=30",
)
"""Of ``small``: the rows of text, and as many as two cores take in half an hour."""
SMALL_WINDOWS = 8
"""Of 512 tokens (``--limit``: others); a search reads as many behind them."""
PICTURED = ("grace_no_relational", "relation_in_the_middle", "relation_early")
"""Rows that differ from GRACE in nothing without pictures."""
CALIBRATION_ROWS, SMALL_CALIBRATION_ROWS = 128, 16
LEFT_OVER = 3
"""Exit code: the time is up and work is left."""
STAGES = {
    "teacher": ("teacher_1_vision", "teacher_2_all"),
    "student": ("student",),
}
"""Recipes of a stage, in order; each run is ``runs/smollm2/<recipe>``."""
SCHEME = "w4g64"
METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("method=sft", "scheme=bf16", "model.teacher=null"),
    "qat": ("method=qat", "model.teacher=null"),
    "kd": ("method=kd",),
    "grace": (),
    "grace_no_gate": ("loss.gate=false",),
    "grace_no_decoupled": ("loss.decoupled=false",),
    "grace_no_relational": ("loss.relational=false",),
    "grace_no_adaptive": ("loss.adaptive=false",),
}
ABLATIONS = tuple(name for name in METHODS if name.startswith("grace_no_"))
ROUNDED: dict[str, tuple[Any, Any]] = {
    "rtn_minmax": ("rtn", "minmax"),
    "rtn": ("rtn", "mse"),
    "awq": ("awq", "minmax"),
    "gptq": ("gptq", "minmax"),
    "block": ("block", "mse"),
}
"""Rows without training: method and scale rule. AWQ and GPTQ are published with min-max scales; of block
reconstruction scales are trained, from our own start."""
OTHER_RULES: dict[str, tuple[Any, Any]] = {
    "awq_mse": ("awq", "mse"),
    "gptq_mse": ("gptq", "mse"),
    "rtn_signed": ("rtn", "mse_signed"),
    "awq_signed": ("awq", "mse_signed"),
    "gptq_signed": ("gptq", "mse_signed"),
    "block_signed": ("block", "mse_signed"),
}
"""The same with other scale rules of ours."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "kd_global_t1": ("method=kd", "loss.temperature=1"),
    "microbatch": ("loss.normalization=microbatch",),
    "temperature_1": ("loss.temperature=1",),
    "temperature_4": ("loss.temperature=4",),
    "even_parts": ("loss.nckd_weight=1",),
    "target_1": ("loss.adaptive_weight.target=1",),
    "relation_in_the_middle": ("loss.relational_layer=-8",),
    "relation_early": ("loss.relational_layer=4",),
    "gate_of_margin": ("loss.gate_signal=margin",),
    "gate_cold": ("loss.gate_temperature=0.25",),
    "five_bit_scales": ("quant.scale_rounding=sig5",),
    "head_w8": ("quant.head=w8g64",),
    "lsq_gradient": ("quant.scale_gradient=lsq",),
    "signed_scales": ("quant.scale_init=mse_signed",),
    "minmax_start": ("quant.scale_init=minmax",),
    "frozen_scales": ("optim.scale_learning_rate=0",),
    "twice_as_long": ("optim.num_steps=DOUBLE",),
    "from_w8": ("model.student=FIRST",),
    "from_blocks": ("model.student=FIRST", "quant.scale_init=stored"),
    "from_signed_blocks": ("model.student=FIRST", "quant.scale_init=stored"),
    "from_awq": ("model.student=FIRST", "quant.scale_init=stored"),
    "from_signed_awq": ("model.student=FIRST", "quant.scale_init=stored"),
    "self_first": ("model.student=FIRST",),
}
QUANTIZED_FIRST: dict[str, tuple[Any, Any]] = {
    "from_blocks": ("block", "mse"),
    "from_signed_blocks": ("block", "mse_signed"),
    "from_awq": ("awq", "mse"),
    "from_signed_awq": ("awq", "mse_signed"),
}
"""Variants that go on from the student as ``grace quantize --for-training`` leaves it: its method and scale rule."""
TWO_STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "from_w8": ("w8g64", ()),
    "self_first": ("bf16", ("model.teacher=STUDENT",)),
}
"""Variants that go on from a run of their own: its scheme, and what it changes."""
SEARCHED = ("qat", "kd", "grace")
RATES = (2e-5, 5e-5, 1e-4, 2e-4)
LANGUAGE_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
"""Of ``--language``, whose runs have a tenth of the steps."""
SCALE_RATE = 20
"""Of the scales to that of the weights, as published (2e-4 and 1e-5)."""


@dataclass(frozen=True)
class Job:
    """One row."""

    name: str
    scheme: str = SCHEME
    seed: int | None = None
    rate: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.scheme, self.seed, self.rate


class Clock:
    """The minutes that there are, and a run that is stopped with a checkpoint when they are over."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, training gets what a scheduler would send it, and stops with a checkpoint; while a run is opened or
        published it is ``StoppedError`` at once, and what is on the disk stays as it is."""
        if self.end is None:
            yield
            return
        before = {
            signal.SIGALRM: signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGUSR1)),
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, _stop_at_once),
        }
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self.end - time.monotonic()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop_at_once(number: int, frame: Any) -> None:
    from grace_vlm.errors import StoppedError

    raise StoppedError("the time was up while the run was opened or published", number)


def join_rows(out: Path) -> int:
    """Conversations about pictures and rows of text in one file, below ``WORLD``; how many rows."""
    parts = (WORLD / "conversations.jsonl", TEXT / "train.jsonl")
    for part in parts:
        if not part.is_file():
            sys.exit(f"{part} does not exist; make it with grace data prepare {part.parent.name} (docs/world.md)")
    content = b"".join(part.read_bytes() for part in parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(out, content)
    return content.count(b"\n")


def run_stage(name: str, clock: Clock, overrides: Sequence[str]) -> bool:
    """Train a stage's recipes, going on where they stopped; whether all are complete."""
    from grace_vlm.errors import StoppedError
    from grace_vlm.train.loop import train

    for recipe in STAGES[name]:
        out, started = RUNS / recipe, time.monotonic()
        if clock.is_over:
            return False
        try:
            with clock.stopping():
                train(stage_recipe(recipe, overrides), out, resume=True, notify=print, progress=_say)
        except StoppedError as stopped:
            print(f"{recipe}: {stopped}")
            return False
        finally:
            if _is_first():
                _add_seconds(out, time.monotonic() - started)
        if _is_first():
            print(f"{recipe} is complete: {out / 'final'}", flush=True)
    return True


def stage_recipe(name: str, overrides: Sequence[str]) -> Any:
    """A stage's recipe; several processes share a micro-batch."""
    from grace_vlm.train.config import load_recipe

    path, count = RECIPES / f"{name}.yaml", int(os.environ.get("WORLD_SIZE", "1"))
    recipe = load_recipe(path, overrides)
    if count == 1:
        return recipe
    rows = recipe.data.micro_batch_size
    if rows % count:
        sys.exit(f"{count} processes cannot share the {rows} rows of a micro-batch of {name}")
    return load_recipe(path, [*overrides, f"data.micro_batch_size={rows // count}", f"data.accumulation={count}"])


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(report: Any, num_steps: int) -> None:
    done = report.step + 1
    if _is_first() and (done % 100 == 0 or done == num_steps):
        print(f"  step {done} of {num_steps}, loss {report.loss:.4f}", flush=True)


def _add_seconds(out: Path, seconds: float) -> None:
    """Of a stage's run, over all the times it was begun: ``seconds.txt`` beside its checkpoints."""
    if not out.is_dir():
        return
    path = out / "seconds.txt"
    before = float(path.read_text()) if path.is_file() else 0.0
    path.write_text(f"{before + seconds:.1f}\n")


def student_path() -> Path:
    return RUNS / STAGES["student"][-1]


def recipe_of(job: Job, overrides: Sequence[str]) -> Any:
    """The comparison's recipe as a trained row has it."""
    from grace_vlm.train.config import load_recipe

    changes = METHODS.get(job.name) or VARIANTS.get(job.name, ())
    steps = load_recipe(RECIPES / "comparison.yaml", overrides).optim.num_steps
    words = {"DOUBLE": str(2 * steps), "FIRST": str(first_stage(job))}
    stated = [change.partition("=") for change in changes]
    return load_recipe(
        RECIPES / "comparison.yaml",
        [
            f"scheme={job.scheme}",
            f"runtime.seed={job.seed}",
            f"optim.learning_rate={job.rate}",
            f"optim.scale_learning_rate={SCALE_RATE * (job.rate or 0)}",
            *overrides,
            *(f"{key}={words.get(value, value)}" for key, _, value in stated),
        ],
    )


def first_stage(job: Job) -> Path:
    """The run that a variant of two stages goes on from; one for each seed, which several GPUs may have at once."""
    return RUNS / f"{job.name}_{job.seed}"


def digest_of(student: str) -> str:
    """The hash that rows of a student carry."""
    from grace_vlm.evals.suite.run import weights_digest
    from grace_vlm.models.load import resolve_source

    return weights_digest(resolve_source(student))


class Table:
    """Rows of one command, made one after another in one process: what is compiled and decoded once serves all."""

    def __init__(
        self, path: Path, overrides: Sequence[str], exam: Any, calibration_rows: int = CALIBRATION_ROWS
    ) -> None:
        from grace_vlm.models.load import load_model

        self.path, self.overrides, self.calibration_rows = path, tuple(overrides), calibration_rows
        recipe = recipe_of(Job("grace", seed=0, rate=RATES[0]), self.overrides)
        self.student_name = str(recipe.model.student)
        self.student = digest_of(self.student_name)
        self.recipe = recipe
        self.reference = load_model(self.student_name)
        from smollm2_measure import Examination

        self.examination = Examination(exam, self.reference)

    def done(self) -> set[tuple[Any, ...]]:
        return {_key(row) for row in read_rows(self.path) if row["student"] == self.student}

    def make(self, jobs: Sequence[Job], clock: Clock) -> bool:
        """The rows that are missing, each appended as it is finished; whether none is left."""
        done = self.done()
        left = [job for job in jobs if job.key not in done]
        print(f"{len(left)} of {len(jobs)} rows to make for student {self.student}", flush=True)
        for job in left:
            if clock.is_over:
                return False
            started = time.monotonic()
            row = self.row(job)
            row["seconds"] = round(time.monotonic() - started, 1)
            append_row(self.path, row)
            print(_shown(row), flush=True)
        return True

    def row(self, job: Job) -> dict[str, Any]:
        """Make a job's model and ask it everything."""
        import torch
        import transformers

        started = time.monotonic()
        loaded, diary = self._model(job)
        made_seconds = time.monotonic() - started
        found = self.examination.of(loaded, self.reference)
        first, last = (diary[0], diary[-1]) if diary else ({}, {})
        shown = ("cross_entropy", "distillation", "relational", "gate_mean", "weight")
        return {
            "name": job.name,
            "scheme": job.scheme,
            "seed": job.seed,
            "rate": job.rate,
            "student": self.student,
            "steps": len(diary) and last["step"] + 1,
            "made_seconds": round(made_seconds, 1),
            "first": {name: first.get(name) for name in shown if diary},
            "last": {name: last.get(name) for name in shown if diary},
            **found,
            "device": device_name(next(loaded.model.parameters()).device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit_name(),
        }

    def _model(self, job: Job) -> tuple[Any, list[dict[str, Any]]]:
        from grace_vlm.models.load import load_model

        if job.name == "student":
            return load_model(self.student_name), []
        if job.name == "teacher":
            return load_model(str(self.recipe.model.teacher)), []
        if job.name in (*ROUNDED, *OTHER_RULES):
            return self._rounded(job), []
        return self._trained(job)

    def _rounded(self, job: Job) -> Any:
        """RTN, AWQ, GPTQ or block reconstruction of the student, calibrated on rows of the training file."""
        from grace_vlm.models.adapter import plan_model
        from grace_vlm.models.load import load_model
        from grace_vlm.ptq.calibration import Calibration, calibration_entries, calibration_replay
        from grace_vlm.ptq.layers import quantize_layers
        from grace_vlm.ptq.rtn import round_to_nearest

        loaded = load_model(self.student_name)
        method, rule = (ROUNDED | OTHER_RULES)[job.name]
        plan = plan_model(loaded.model, loaded.adapter, job.scheme)
        if method == "rtn":
            round_to_nearest(loaded.model, plan, rule)
            return loaded
        data, dtype = self.recipe.data, loaded.model.dtype
        loaded.model.float()
        entries = calibration_entries(loaded, Calibration(data.rows_path, data.images_root, self.calibration_rows))
        quantize_layers(loaded.model, plan.schemes, calibration_replay(loaded, entries), method, rule)
        loaded.model.to(dtype)
        return loaded

    def _trained(self, job: Job) -> tuple[Any, list[dict[str, Any]]]:
        from grace_vlm.models.load import load_model
        from grace_vlm.train.loop import train
        from grace_vlm.train.record import read_metrics

        first = self._before(job)
        out = RUNS / "rows" / "_".join(str(part) for part in job.key)
        final = train(recipe_of(job, self.overrides), out, overwrite=True)
        loaded, diary = load_model(str(final)), read_metrics(out / "metrics.jsonl")
        shutil.rmtree(out)
        if first is not None:
            shutil.rmtree(first)
        return loaded, diary

    def _before(self, job: Job) -> Path | None:
        """The model that a variant of two stages goes on from, of the same student, seed and rate; None for others."""
        from grace_vlm.ptq.calibration import Calibration
        from grace_vlm.ptq.quantize import quantize_folder
        from grace_vlm.train.loop import train

        first_out = first_stage(job)
        if job.name in QUANTIZED_FIRST:
            data = self.recipe.data
            rows = Calibration(data.rows_path, data.images_root, self.calibration_rows, int(job.seed or 0))
            method, rule = QUANTIZED_FIRST[job.name]
            quantize_folder(
                self.student_name,
                first_out,
                job.scheme,
                method=method,
                scale=rule,
                calibration=rows,
                for_training=True,
                overwrite=True,
            )
        elif job.name in TWO_STAGES:
            scheme, changes = TWO_STAGES[job.name]
            first = replace(job, name="grace", scheme=scheme)
            stated = [change.replace("STUDENT", self.student_name) for change in changes]
            train(recipe_of(first, (*self.overrides, *stated)), first_out, overwrite=True)
        else:
            return None
        return first_out


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["scheme"], row["seed"], row["rate"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of rows; none if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """A line, in one piece and on the disk; several processes may write to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, separators=(",", ":")) + "\n").encode()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def mean_of_suite(row: dict[str, Any]) -> float | None:
    """Mean over the benchmarks of their own scores."""
    values = [one["value"] for one in row["suite"].values()]
    return sum(values) / len(values) if values else None


def right_of(row: dict[str, Any]) -> float | None:
    """Share of the held-out questions that are right, of those that were asked."""
    bits = row["questions"].get("correct")
    return bits.count("1") / (len(bits) - bits.count("-")) if bits else None


def loss_of(row: dict[str, Any], text: str) -> float:
    """Mean cross-entropy of a text, nats a token."""
    losses = row["texts"][text]["losses"]
    return float(sum(losses) / len(losses))


def _shown(row: dict[str, Any]) -> str:
    import math

    words = [str(part) for part in _key(row) if part is not None]
    for label, value in (("suite", mean_of_suite(row)), ("questions", right_of(row))):
        words += [] if value is None else [f"{label} {100 * value:.2f}"]
    words += [f"{name} {math.exp(loss_of(row, name)):.3f}" for name in row["texts"]]
    return "  " + " ".join((*words, f"{row['seconds']} s"))


def search_jobs(rates: Sequence[float] = RATES) -> list[Job]:
    return [Job(name, SCHEME, 100, rate) for name in SEARCHED for rate in rates]


def best_rates(rows: Sequence[dict[str, Any]], rates: Sequence[float] = RATES) -> dict[str, float]:
    """Of each searched method the rate with the best validation score; the search must be complete, or later rows
    would have another rate than earlier ones."""
    best: dict[str, tuple[float, float]] = {}
    wanted = {job.key: job for job in search_jobs(rates)}
    rows = [row for row in rows if _key(row) in wanted]
    if left := wanted.keys() - {_key(row) for row in rows}:
        names = ", ".join(sorted({wanted[key].name for key in left}))
        search = "search --language" if rates == LANGUAGE_RATES else "search"
        sys.exit(f"{len(left)} rows of the search are missing ({names}); run: python benchmarks/smollm2.py {search}")
    for row in rows:
        score = validation_score(row)
        if row["name"] not in best or score > best[row["name"]][0]:
            best[row["name"]] = (score, row["rate"])
    return {name: rate for name, (_, rate) in best.items()}


def searched_rates(out: Path, student: str, rates: Sequence[float] = RATES) -> dict[str, float]:
    """``best_rates`` of the rows that a search for this student left in ``out``."""
    return best_rates([row for row in read_rows(out / "search.jsonl") if row["student"] == student], rates)


def validation_score(row: dict[str, Any]) -> float:
    """Share of right answers on every second hundred of the questions, the report tests on the others; of a row without
    questions its loss on the search's windows, negated."""
    bits = row["questions"].get("correct")
    if not bits:
        return -loss_of(row, "prose")
    own = [bit == "1" for number, bit in enumerate(bits) if is_validation(number)]
    return sum(own) / len(own)


def is_validation(number: int) -> bool:
    """Questions of one picture follow each other, so blocks of a hundred are dealt out, not single questions."""
    return number // 100 % 2 == 0


def trained(name: str, scheme: str, seeds: Sequence[int], rates: dict[str, float]) -> list[Job]:
    """A method's rows. What was not searched has the rate of GRACE, and fine-tuning alone that of QAT, whose loss it
    has."""
    if name == "sft":
        return [Job(name, "bf16", seed, rates["qat"]) for seed in seeds]
    return [Job(name, scheme, seed, rates.get(name, rates["grace"])) for seed in seeds]


def headline_jobs(rates: dict[str, float]) -> list[Job]:
    """Everyone's first seed before anyone's second."""
    jobs = [Job("teacher", "bf16"), Job("student", "bf16"), *(Job(name) for name in ROUNDED)]
    return jobs + [job for seed in range(5) for name in SEARCHED for job in trained(name, SCHEME, [seed], rates)]


def other_jobs(rates: dict[str, float]) -> list[Job]:
    jobs = [Job(name) for name in OTHER_RULES]
    jobs += [Job(name, scheme) for scheme in ("w8g64", "w3g64", "w4g32") for name in (*ROUNDED, *OTHER_RULES)]
    for seed in range(3):
        for scheme in ("w3g64", "w8g64", "w4g32"):
            jobs += [job for name in SEARCHED for job in trained(name, scheme, [seed], rates)]
        jobs += [job for name in ("sft", *ABLATIONS) for job in trained(name, SCHEME, [seed], rates)]
    return jobs


def variant_jobs(rates: dict[str, float]) -> list[Job]:
    return [job for seed in range(5) for name in VARIANTS for job in trained(name, SCHEME, [seed], rates)]


def small_jobs() -> list[Job]:
    """The language alone, all 30 layers: its teacher is the model itself before it was rounded."""
    jobs = [Job("student", "bf16"), *(Job(name) for name in (*ROUNDED, *OTHER_RULES))]
    return jobs + [Job(name, SCHEME, 0, RATES[1]) for name in SEARCHED]


def write_language() -> Path:
    """SmolLM2 with a tower that nobody asks, as a model folder."""
    from grace_vlm.formats.publish import publish_model
    from grace_vlm.models.smollm2 import build_smollm2, build_smollm2_processor

    out = RUNS / "language"
    if not (out / "config.json").is_file():
        processor = build_smollm2_processor()
        model = build_smollm2("smollm2:30", processor)
        publish_model(out, model, processor, {}, (), "# SmolLM2 in LLaVA\n\nThe tower is random.\n", overwrite=True)
    return out


JOBS: dict[str, Callable[[dict[str, float]], list[Job]]] = {
    "headline": headline_jobs,
    "others": other_jobs,
    "variants": variant_jobs,
}


def share_of(text: str) -> tuple[int, int]:
    """``1/4``: the second of four."""
    index, _, count = text.partition("/")
    return int(index), int(count)


def require_gpus(made: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """An error for GPUs that are not there, and for a command that has no rows to share."""
    import torch

    if args.command not in ("search", *JOBS):
        made.error(f"--gpus is for search, {', '.join(JOBS)}; {args.command} runs on one")
    if not 1 <= args.gpus <= torch.cuda.device_count():
        made.error(f"--gpus is {args.gpus} and {torch.cuda.device_count()} GPUs are here")


def on_gpus(count: int, arguments: Sequence[str]) -> int:
    """The same command on so many GPUs, each with its share of the rows; the exit code of all together."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if given is None else given.split(",")[:count]
    with contextlib.ExitStack() as running:
        started = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, *arguments, "--gpus=1", f"--share={index}/{count}"],
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": name},
                )
            )
            for index, name in enumerate(names)
        ]
        before = signal.signal(signal.SIGTERM, lambda number, frame: [one.terminate() for one in started])
        codes = [one.wait() for one in started]
        signal.signal(signal.SIGTERM, before)
    faults = [code for code in codes if code not in (0, LEFT_OVER)]
    return faults[0] if faults else max(codes)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("command", choices=("data", *STAGES, "search", *JOBS, "small"))
    made.add_argument("overrides", nargs="*", help="key=value of the recipes")
    made.add_argument("--minutes", type=float, help="no row is begun after so many; a stage stops with a checkpoint")
    made.add_argument("--language", action="store_true", help="the language alone, on two CPU cores")
    made.add_argument("--only", type=lambda text: text.split(","), help="names of rows, with commas; all if left out")
    made.add_argument("--out", type=Path, help=f"folder of the rows; {OUT}, or {LANGUAGE_OUT} with --language")
    made.add_argument("--gpus", type=int, default=1, help="that make rows at once")
    made.add_argument("--share", type=share_of, default=(0, 1), help=argparse.SUPPRESS)
    made.add_argument("--limit", type=int, help="questions of each benchmark, of the file, and windows of each text")
    args = made.parse_intermixed_args()
    if args.command == "data":
        print(f"{join_rows(ROWS):,} rows in {ROWS}")
        return
    if args.command in STAGES and (args.language or args.only):
        made.error(f"--language and --only are of rows, and {args.command} is a training run of pictures")
    clock = Clock(args.minutes)
    if args.language and args.gpus != 1:
        made.error("--language is for a CPU; leave --gpus out")
    if args.gpus != 1:
        require_gpus(made, args)
        sys.exit(on_gpus(args.gpus, sys.argv[1:]))
    if args.command in STAGES:
        sys.exit(0 if run_stage(args.command, clock, args.overrides) else LEFT_OVER)
    from smollm2_measure import Exam

    out = args.out or (LANGUAGE_OUT if args.language else OUT)
    overrides, calibration_rows = list(args.overrides), CALIBRATION_ROWS
    exam = Exam(SUITE, WORLD / "test.jsonl", {"prose": TEXT / "heldout.txt"}, limit=args.limit)
    if args.language or args.command == "small":
        calibration_rows = SMALL_CALIBRATION_ROWS
        language = write_language()
        overrides = [*SMALL, f"model.student={language}", f"model.teacher={language}", *overrides]
        exam = replace(exam, suite=None, questions=None, limit=args.limit or SMALL_WINDOWS)
        if args.command == "search":
            exam = replace(exam, first_window=exam.limit or 0)
    elif args.command == "search":  # asked is what chooses a rate, and nothing that the report tests on
        exam = replace(exam, suite=None, texts={}, is_asked=is_validation)
    table = Table(out / f"{args.command}.jsonl", overrides, exam, calibration_rows)
    rates = LANGUAGE_RATES if args.language else RATES
    if args.command in JOBS:
        jobs = JOBS[args.command](searched_rates(out, table.student, rates))
    else:
        jobs = search_jobs(rates) if args.command == "search" else small_jobs()
    if args.language:
        jobs = [job for job in jobs if job.name not in (*PICTURED, "teacher")]
    if args.only:
        names = sorted({job.name for job in jobs})
        if unknown := sorted(set(args.only) - set(names)):
            made.error(f"{args.command} has no row {unknown[0]}; it has {', '.join(names)}")
        jobs = [job for job in jobs if job.name in args.only]
    first, count = args.share
    sys.exit(0 if table.make(jobs[first::count], clock) else LEFT_OVER)


if __name__ == "__main__":
    main()
