"""Makes rows of the SmolLM2 comparison: a job's model, asked everything."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from record import commit_name, device_name
from smollm2_jobs import (
    OTHER_RULES,
    QUANTIZED_FIRST,
    RATES,
    ROUNDED,
    RUNS,
    SEEN_FILE,
    TWO_STAGES,
    Job,
    first_stage,
    recipe_of,
)
from smollm2_rows import append_row, claim, key_of, read_rows, shown_of, words_of


class Deadline(Protocol):
    """Says when no row may be begun."""

    @property
    def is_over(self) -> bool: ...


CALIBRATION_ROWS, SMALL_CALIBRATION_ROWS = 128, 16


def repeat_to_the_bit() -> None:
    """cuBLAS reads its workspace once, when a process first multiplies, and a first row need not be a trained one
    (``train/repeat.py`` would be late)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def digest_of(student: str) -> str:
    """The hash that rows of a student carry: of its weights alone, which another version of Transformers writes with
    another configuration beside them."""
    from grace_vlm.checkpoint.manifest import sha256_file
    from grace_vlm.models.load import resolve_source

    folder = Path(resolve_source(student))
    found, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    if not files:
        sys.exit(f"{folder} has no *.safetensors; a student of this comparison is a folder with weights")
    for path in files:
        found.update(f"{path.name} {sha256_file(path)}\n".encode())
    return found.hexdigest()[:32]


def base_recipe(overrides: Sequence[str]) -> Any:
    """What all rows have in common."""
    return recipe_of(Job("grace", seed=0, rate=RATES[0]), overrides)


def student_of(overrides: Sequence[str]) -> str:
    """Whose rows they are."""
    return str(base_recipe(overrides).model.student)


def done_rows(path: Path, student: str) -> set[tuple[Any, ...]]:
    """Keys of a student's rows in a file."""
    return {key_of(row) for row in read_rows(path) if row["student"] == student}


def claim_of(path: Path, job: Job) -> Path:
    """What stands for a job's row in that file, wherever two commands write."""
    return RUNS / "claims" / "_".join(path.resolve().parts[1:]) / job.label


class Made(NamedTuple):
    """A job's model. diary: what its training noted; run: its folder, None where nothing was trained."""

    loaded: Any
    diary: Sequence[dict[str, Any]] = ()
    run: Path | None = None


class Table:
    """Rows of one command, made one after another in one process: what is compiled and decoded once serves all.

    Args:
        beside: so many other processes make rows on the same GPU; it is noted, since times then say nothing.
    """

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str],
        exam: Any,
        calibration_rows: int = CALIBRATION_ROWS,
        beside: int = 0,
    ) -> None:
        from grace_vlm.models.load import load_model

        self.path, self.overrides, self.calibration_rows = path, tuple(overrides), calibration_rows
        self.beside = beside
        self.recipe = base_recipe(self.overrides)
        self.student_name = str(self.recipe.model.student)
        self.student = digest_of(self.student_name)
        self._teacher: str | None = None
        self._has_trained = False
        self.reference = load_model(self.student_name)
        from smollm2_measure import Examination

        self.examination = Examination(exam, self.reference)

    def done(self) -> set[tuple[Any, ...]]:
        return done_rows(self.path, self.student)

    def teacher_of(self, job: Job) -> str | None:
        """The hash of the teacher that a job's model learned from, or is."""
        if job.name != "teacher" and (job.rate is None or not recipe_of(job, self.overrides).objective().needs_teacher):
            return None
        if self._teacher is None:
            self._teacher = digest_of(str(self.recipe.model.teacher))
        return self._teacher

    def make(self, jobs: Sequence[Job], clock: Deadline) -> bool:
        """The rows that are missing and that no other process is making, each appended as it is finished; whether none
        is left."""
        done = self.done()
        left = [job for job in jobs if job.key not in done]
        print(f"{len(left)} of {len(jobs)} rows to make for student {self.student}", flush=True)
        if not left:
            print(f"they are in {self.path}; --out FOLDER makes them in another", flush=True)
        for job in left:
            with claim(claim_of(self.path, job)) as is_ours:
                if not is_ours or job.key in self.done():
                    continue
                if clock.is_over:
                    return False
                started = time.monotonic()
                if not self.beside:
                    print(f"  {' '.join(words_of(job.key))} ...", flush=True)
                row = self.row(job)
                row |= {"seconds": round(time.monotonic() - started, 1), "beside": self.beside}
                append_row(self.path, row)
                print(shown_of(row), flush=True)
        return True

    def row(self, job: Job) -> dict[str, Any]:
        """Make a job's model and ask it everything."""
        import torch
        import transformers

        started = time.monotonic()
        loaded, diary, run = self._model(job)
        made_seconds = time.monotonic() - started
        has_compiled = run is not None and not self._has_trained
        self._has_trained |= run is not None
        weights = None if run is None else digest_of(str(run))
        if run is not None:
            shutil.rmtree(run)
        found = self.examination.of(loaded, self.reference)
        first, last = (diary[0], diary[-1]) if diary else ({}, {})
        shown = ("cross_entropy", "distillation", "relational", "gate_mean", "weight")
        return {
            "name": job.name,
            "scheme": job.scheme,
            "seed": job.seed,
            "rate": job.rate,
            "student": self.student,
            "teacher": self.teacher_of(job),
            "weights": weights,
            "steps": len(diary) and last["step"] + 1,
            "compiled": has_compiled,
            "made_seconds": round(made_seconds, 1),
            "first": {name: first.get(name) for name in shown if diary},
            "last": {name: last.get(name) for name in shown if diary},
            **found,
            "device": device_name(next(loaded.model.parameters()).device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit_name(),
        }

    def _model(self, job: Job) -> Made:
        from grace_vlm.models.load import load_model

        if job.name == "student":
            return Made(load_model(self.student_name))
        if job.name == "teacher":
            return Made(load_model(str(self.recipe.model.teacher)))
        if job.name in (*ROUNDED, *OTHER_RULES):
            return Made(self._rounded(job))
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

    def _trained(self, job: Job) -> Made:
        from grace_vlm.models.load import load_model
        from grace_vlm.train.loop import train
        from grace_vlm.train.record import read_metrics

        first = self._before(job)
        out = RUNS / "rows" / f"{self.path.stem}_{job.label}"  # two commands may have one job
        final = train(recipe_of(job, self.overrides), out, overwrite=True)
        made = Made(load_model(str(final)), read_metrics(out / "metrics.jsonl"), out)
        if first is not None:
            shutil.rmtree(first)
        return made

    def _before(self, job: Job) -> Path | None:
        """What a variant goes on from, in a folder of this row: a model of the same student, seed and rate, or rows of
        its own; None for others."""
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
        elif job.name == "seen_twice":
            data = self.recipe.data
            lines = data.rows_path.read_text(encoding="utf-8").splitlines(keepends=True)
            count = min(len(lines), self.recipe.optim.num_steps * data.micro_batch_size * data.accumulation)
            first_out.mkdir(parents=True, exist_ok=True)
            seen = random.Random(job.seed).sample(lines, count)
            (first_out / SEEN_FILE).write_text("".join(seen), encoding="utf-8")
        else:
            return None
        return first_out
