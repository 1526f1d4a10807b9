"""A run from recipe to model folder: build, resume or start, step, record, save, publish.

    out/config.yaml  plan.json  metrics.jsonl  ledger.jsonl  checkpoints/step-N/  final/

``final/`` is a model folder (formats/publish.py). Everything that decides the rest of a run is in ``TrainState``: a
run that is killed at any instant and resumed ends with the same bytes as one that was not.

Of several processes (``ranks.py``) the first one writes all there is one of; into a checkpoint each writes its share of
the masters and moments, its place in the data and its random state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grace_vlm.checkpoint.atomic import write_bytes_atomic
from grace_vlm.checkpoint.lock import FolderLock
from grace_vlm.checkpoint.rng import capture_rng, restore_rng
from grace_vlm.checkpoint.store import (
    TrainState,
    find_checkpoint,
    load_shares,
    save_checkpoint,
)
from grace_vlm.data.ledger import Ledger
from grace_vlm.errors import ConfigError, GraceError, StoppedError
from grace_vlm.formats.publish import publish_model
from grace_vlm.losses.controller import AdaptiveWeight
from grace_vlm.models.adapter import stored_name
from grace_vlm.models.compiled import compile_layers
from grace_vlm.models.graphs import graph_layers
from grace_vlm.models.look_up import sum_look_ups
from grace_vlm.models.vision import VisionFeatures, recompute_tower
from grace_vlm.train.card import model_card
from grace_vlm.train.config import Recipe, Sharding, dump_recipe
from grace_vlm.train.heap import quiet_heap
from grace_vlm.train.launcher import asked_for, resolved
from grace_vlm.train.masters import Masters
from grace_vlm.train.open import (
    check_relational_layer,
    check_trained_tower,
    choose_trained,
    open_loader,
    open_rows,
    open_student,
    open_teacher,
    pick_teacher_device,
    plan_for,
    scale_start,
)
from grace_vlm.train.optim import Optimizer
from grace_vlm.train.ranks import Ranks
from grace_vlm.train.record import Recorder, read_metrics
from grace_vlm.train.repeat import repeatable
from grace_vlm.train.reshard import shared_out
from grace_vlm.train.resume import fingerprint_of, what_is_not_exact
from grace_vlm.train.run_folder import (
    Notify,
    is_complete,
    ledger_name,
    prepare_run_folder,
    require_same_recipe,
)
from grace_vlm.train.shards import attach, shard_frozen
from grace_vlm.train.step import PendingStep, Stepper, StepReport
from grace_vlm.train.stop import StopRequests
from grace_vlm.train.teacher import OnlineTeacher, Teacher
from grace_vlm.train.teacher_cache import CachedTeacher, open_cached_teacher

Progress = Callable[[StepReport, int], None]
GIB = 1 << 30


class Run:
    """One training run in one folder.

    Args:
        ranks: its processes; None: those that the launcher started. requests: to stop; None: none will come.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        notify: Notify = lambda text: None,
        ranks: Ranks | None = None,
        requests: StopRequests | None = None,
    ) -> None:
        self.recipe, self.out, self.notify = recipe, out, notify
        self.requests = StopRequests() if requests is None else requests
        self.ranks = Ranks.started(recipe.runtime.device) if ranks is None else ranks
        self.device = self.ranks.device
        self.num_micro_batches = recipe.on_each_of(self.ranks.count).data.accumulation
        if recipe.has_teacher_elsewhere:
            pick_teacher_device(recipe)
            if self.ranks.count > 1:
                raise ConfigError("model.teacher_device is one GPU for one process; leave it out with several")
        self.sharding = self._choose_sharding()
        torch.manual_seed(recipe.runtime.seed)
        rows = open_rows(recipe)
        self.student = open_student(recipe, rows)
        self.plan = plan_for(recipe, (self.student.model, self.student.adapter))
        check_relational_layer(recipe, self.student.model)
        check_trained_tower(recipe, self.student.model)
        choose_trained(recipe, self.student)
        cache_bytes = int(recipe.runtime.tower_cache_gib * GIB)
        self.vision = VisionFeatures(self.student.adapter, self.student.model, cache_bytes, recipe.trains_tower)
        # First: its workers' server imports beside what follows.
        self.ledger = Ledger(out / ledger_name(self.ranks.index))
        self.loader = open_loader(
            recipe,
            rows,
            self.student,
            self.ledger,
            self.device,
            # Without a cache there is nothing to ask, and workers could not.
            keeps=self._keeps_features if recipe.runtime.tower_cache_gib else None,
            rank=self.ranks.index,
            world_size=self.ranks.count,
        )
        self.masters = Masters(
            self.student.model,
            self.plan,
            scale_init=scale_start(recipe, self.student, self.plan),
            clip_mask=recipe.quant.clip_mask,
            scale_gradient=recipe.quant.scale_gradient,
            ranks=self.ranks,
            sharding=self.sharding,
            layers=tuple(self.student.model.model.language_model.layers),
            gather=recipe.runtime.gather,
        )
        if self.masters.shards is not None:
            attach(self.student.model, self.masters.shards)
        self.optimizer = Optimizer(self.masters, recipe.optim)
        self.teacher = self._open_teacher(cache_bytes)
        self.adaptive = self._adaptive_weight()
        self.stepper = Stepper(
            recipe,
            self.student,
            self.vision,
            self.masters,
            self.optimizer,
            self.teacher,
            self.adaptive,
            self.ranks,
        )
        if self.device.type == "cuda":
            # A whole BF16 gradient of a table of words is what a small GPU runs out at.
            sum_look_ups(self.student.model, self.masters.accumulator)
        if recipe.runtime.gradient_checkpointing and recipe.trains_tower:
            recompute_tower(self.student.model)
        if recipe.runtime.compile and self.device.type == "cuda":
            compile_layers(self.student.model)
            if self.teacher is not None:
                self.teacher.compile_layers()
        if recipe.runtime.cuda_graphs and self.device.type == "cuda":
            sums = self.masters.sums_of(self.student.model.model.language_model.layers)
            memory = graph_layers(self.student.model, sums)
            if self.teacher is not None:
                self.teacher.graph_layers(memory)

    def _choose_sharding(self) -> Sharding:
        """By the recipe and the launcher, and said where the launcher decides."""
        asked = asked_for(os.environ)
        sharding = resolved(self.recipe.runtime.sharding, asked)
        self.recipe.check_sharding(sharding)
        if asked is not None:
            self.notify(f"the launcher asks for {asked.whom}: done by grace itself, as runtime.sharding={sharding}")
        return sharding if self.ranks.count > 1 else "optimizer"

    def _keeps_features(self, name: str) -> bool:
        return self.vision.keeps(name) and (self.teacher is None or self.teacher.keeps(name))

    def _open_teacher(self, cache_bytes: int) -> Teacher | None:
        if not self.recipe.objective().needs_teacher:
            return None
        if self.recipe.model.teacher_cache is not None:
            return open_cached_teacher(self.recipe, self.student)
        is_cut = self.recipe.model.teacher_sharding == "parameters" and self.ranks.count > 1
        cut = functools.partial(shard_frozen, ranks=self.ranks) if is_cut else None
        loaded = open_teacher(self.recipe, self.student, cut)
        if loaded is None:
            return None
        check_relational_layer(self.recipe, loaded.model)
        layer, where = self.recipe.loss.relational_layer, next(self.student.model.parameters()).device
        together = self.recipe.frozen_batches_together if is_cut else None
        return OnlineTeacher(loaded, self.recipe.objective(), layer, cache_bytes, where, together)

    def _adaptive_weight(self) -> AdaptiveWeight | None:
        if self.recipe.method != "grace" or not self.recipe.loss.adaptive:
            return None
        return AdaptiveWeight(**self.recipe.loss.adaptive_weight.model_dump())

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resume to be exact."""
        cache = self.recipe.model.teacher_cache if isinstance(self.teacher, CachedTeacher) else None
        return fingerprint_of(self.recipe, self.ranks, self.sharding, cache)

    def state(self, step: int) -> TrainState:
        """Everything that decides the rest of the run, after ``step`` optimizer steps."""
        return TrainState(
            step=step,
            masters={name: tensor.detach() for name, tensor in self.masters.masters()},
            log_scales=self.masters.scale_state(),
            optimizer_tensors=self.optimizer.state_dict(),
            adaptive_weight=self.adaptive.state_dict() if self.adaptive else {},
            sampler=by_process(self.ranks.gather(self.loader.state_dict())),
            rng=by_process(self.ranks.gather(capture_rng())),
            fingerprint=self.fingerprint(),
        )

    def restore(self) -> int:
        """Load the newest complete checkpoint; returns the number of steps done (0: none found).

        One of another number of processes is taken too, and that is said: rows that are packed are shared out anew from
        the place of the process that was least far.
        """
        path, skipped = self.ranks.of_first(find_checkpoint(self.out / "checkpoints") if self.ranks.is_first else None)
        for folder, reason in skipped:
            self.notify(f"skipped {folder.name}: {reason}")
        if path is None:
            return 0
        parts = load_shares(path, self.ranks.index, self.ranks.count)
        require_same_recipe(self.out, self.recipe)
        said = what_is_not_exact(self.fingerprint(), parts[0].fingerprint, self.out)
        is_same_number = parts[0].fingerprint["num_processes"] == self.ranks.count
        state = parts[0] if is_same_number else shared_out(parts, self.masters)
        self.masters.load_state_dict(state.masters, state.log_scales)
        self.optimizer.load_state_dict(state.optimizer_tensors)
        if self.adaptive:
            self.adaptive.load_state_dict(state.adaptive_weight)
        if is_same_number:
            self.loader.load_state_dict(state.sampler[f"{self.ranks.index}"])
            restore_rng(state.rng[f"{self.ranks.index}"])
        else:
            self.loader.load_state_dict(min(state.sampler.values(), key=lambda at: (at["epoch"], at["cursor"])))
        self.notify(f"resumed from {path.name}{said}")
        return state.step

    def steps(self, first: int, record: Callable[[dict[str, Any]], None], progress: Progress) -> None:
        """Run the optimizer steps from ``first`` on, recording and saving.

        A step is read when the next one has been queued, or at once where it is followed by a checkpoint.

        Raises:
            StoppedError: a signal asked for it, of any process; the steps that were queued are done and saved.
        """
        runtime, num_steps = self.recipe.runtime, self.recipe.optim.num_steps
        began: dict[int, float] = {}
        is_asked = False

        def read(pending: PendingStep) -> None:
            """A step took until the next one began, or until now where none did."""
            nonlocal is_asked
            report = pending.resolve()
            self.loader.reader.budget.require_within(report.num_bad)
            seconds = began.get(report.step + 1, time.perf_counter()) - began.pop(report.step)
            if self._is_recorded(report.step):
                record(self._line(report, seconds))
            is_asked = is_asked or report.stop > 0
            progress(report, num_steps)

        pending: PendingStep | None = None
        with quiet_heap() as step_queued:
            for step in range(first, num_steps):
                began[step] = time.perf_counter()
                batches = [self.loader.next() for _ in range(self.num_micro_batches)]
                num_bad = len(self.ledger.faults)
                queued = self.stepper.launch(step, batches, self._is_recorded(step), self.requests.number != 0, num_bad)
                step_queued()
                if pending is not None:
                    read(pending)
                pending, done = queued, step + 1
                is_due = runtime.checkpoint_every_steps > 0 and done % runtime.checkpoint_every_steps == 0
                if (is_due or is_asked) and done < num_steps:
                    read(pending)
                    pending = None
                    saved = self.save(done)
                    if is_asked:
                        number = max(self.ranks.gather(self.requests.number))
                        name = signal.Signals(number).name
                        raise StoppedError(f"stopped by {name}; {saved} is written: go on with --resume", number)
        if pending is not None:
            read(pending)

    def save(self, done: int) -> Path:
        """A checkpoint after so many steps: every process writes its share, the first seals the folder."""
        keep = self.recipe.runtime.keep_checkpoints
        return save_checkpoint(self.out / "checkpoints", done, self.state(done), keep, self.ranks)

    def _is_recorded(self, step: int) -> bool:
        return step % self.recipe.runtime.record_every_steps == 0 or step == self.recipe.optim.num_steps - 1

    def _line(self, report: StepReport, seconds: float) -> dict[str, Any]:
        line = dataclasses.asdict(report)
        del line["stop"], line["num_bad"]
        if self.masters.num_codes:
            line["codes_flipped_fraction"] = report.codes_flipped / self.masters.num_codes
        else:
            del line["codes_flipped"], line["scale_drift"]
        line["tokens_per_second"] = round(report.tokens / seconds, 1)
        return line

    def stored_plan(self) -> dict[str, Any]:
        """The plan in the names that files have."""
        return self.plan.to_json(functools.partial(stored_name, self.student.adapter))

    def publish(self) -> None:
        """Write ``final/``, the model folder of the run, by the first process."""
        num_bad = sum(self.ranks.gather(len(self.ledger.faults)))
        self.masters.settle()
        quantized, elsewhere = self.masters.quantized(), self.masters.freed_leaves()
        if not self.ranks.is_first:
            return
        lines = read_metrics(self.out / "metrics.jsonl")
        publish_model(
            self.out / "final",
            self.student.model,
            self.student.processor,
            quantized,
            self.plan.bf16_names if self.plan.schemes else (),
            model_card(self.recipe, self.plan, lines[-1] if lines else None, num_bad),
            overwrite=True,
            elsewhere=elsewhere,
        )


def by_process(values: list[dict[str, Any]]) -> dict[str, Any]:
    """In a form that JSON keeps."""
    return {f"{index}": value for index, value in enumerate(values)}


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = lambda text: None,
    progress: Progress = lambda report, num_steps: None,
) -> Path:
    """Run a recipe in ``out``; returns the model folder ``out/final``.

    ``resume`` goes on from the newest complete checkpoint (from the start if there is none; at once if the run is
    complete). Without it an existing folder is refused, unless ``overwrite`` clears it.
    """
    with StopRequests() as requests, Ranks.started(recipe.runtime.device) as ranks:
        requests.patient = ranks.count > 1  # if another process dies, the launcher's signal must not come before why
        if not ranks.is_first:
            notify = _silent
        opened = FolderLock(out) if ranks.is_first else contextlib.nullcontext()
        is_new = not out.exists()
        if ranks.is_first:
            prepare_run_folder(out, resume, overwrite)
        with opened, repeatable(recipe.runtime.deterministic and ranks.device.type == "cuda"):
            if ranks.of_first(is_complete(recipe, out, resume, notify) if ranks.is_first else None):
                notify(f"{out} is complete")
                return out / "final"
            try:
                run = Run(recipe, out, notify, ranks, requests)
            except GraceError:
                # What cannot start leaves nothing behind.
                if is_new and ranks.is_first:
                    shutil.rmtree(out)
                raise
            return _run(run, resume, progress)


def _silent(text: str) -> None:
    """What another process says already."""


def _run(run: Run, resume: bool, progress: Progress) -> Path:
    """All steps of a run that is open, and its model folder."""
    recipe, out = run.recipe, run.out
    first = run.restore() if resume else 0
    for line in run.plan.summary():
        run.notify(f"plan: {line}")
    recorder = None
    if run.ranks.is_first:
        write_bytes_atomic(out / "config.yaml", dump_recipe(recipe).encode())
        write_bytes_atomic(out / "plan.json", (json.dumps(run.stored_plan(), indent=1) + "\n").encode())
        recorder = Recorder(out, first, recipe.runtime.trackers, recipe.model_dump(mode="json"))
    try:
        run.requests.patient = True
        run.steps(first, _forget if recorder is None else recorder.add, progress)
        run.requests.patient = run.ranks.count > 1
        run.publish()
    except torch.OutOfMemoryError as error:
        where = f"process {run.ranks.index} of {run.ranks.count}: " if run.ranks.count > 1 else ""
        said = str(error).split(". ")[0]
        advice = "--fit 48GB (the size of your GPU) changes the set-up, --dry-run estimates it"
        raise ConfigError(f"{where}{said}; {advice}") from error
    finally:
        if recorder is not None:
            recorder.close()
        run.loader.close()
    return out / "final"


def _forget(line: dict[str, Any]) -> None:
    """A line that another process writes."""
