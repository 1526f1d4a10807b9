"""A run from recipe to model folder: build, resume or start, step, record, save, publish.

    out/config.yaml  plan.json  metrics.jsonl  ledger.jsonl  checkpoints/step-N/  final/

``final/`` is a model folder (formats/publish.py). Everything that decides the rest of a run is in ``TrainState``: a
run that is killed at any instant and resumed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import nn

from grace_vlm.checkpoint.atomic import sweep_partials, write_bytes_atomic
from grace_vlm.checkpoint.lock import FolderLock
from grace_vlm.checkpoint.manifest import sha256_file
from grace_vlm.checkpoint.rng import capture_rng, restore_rng
from grace_vlm.checkpoint.store import TrainState, find_checkpoint, load_checkpoint, require_same, save_checkpoint
from grace_vlm.data.ledger import Ledger
from grace_vlm.errors import CheckpointError, ConfigError, GraceError
from grace_vlm.formats.publish import publish_model
from grace_vlm.losses.controller import AdaptiveWeight
from grace_vlm.models.adapter import stored_name
from grace_vlm.models.compiled import compile_layers
from grace_vlm.models.graphs import graph_layers
from grace_vlm.models.load import use_device
from grace_vlm.models.look_up import sum_look_ups
from grace_vlm.models.vision import VisionFeatures
from grace_vlm.train.cache_identity import FILE as CACHE_FILE
from grace_vlm.train.card import model_card
from grace_vlm.train.config import Recipe, dump_recipe
from grace_vlm.train.masters import Masters
from grace_vlm.train.open import (
    check_relational_layer,
    choose_trained,
    open_loader,
    open_rows,
    open_student,
    open_teacher,
    pick_teacher_device,
    plan_for,
)
from grace_vlm.train.optim import Optimizer
from grace_vlm.train.record import Recorder, read_metrics
from grace_vlm.train.step import PendingStep, Stepper, StepReport
from grace_vlm.train.teacher import OnlineTeacher, Teacher
from grace_vlm.train.teacher_cache import CachedTeacher, open_cached_teacher

Notify = Callable[[str], None]
Progress = Callable[[StepReport, int], None]
GIB = 1 << 30


class Run:
    """One training run in one folder."""

    def __init__(self, recipe: Recipe, out: Path, notify: Notify = lambda text: None) -> None:
        self.recipe, self.out, self.notify = recipe, out, notify
        chosen = use_device(recipe.runtime.device)
        self.accelerator = Accelerator(cpu=chosen.type == "cpu")
        if recipe.has_teacher_elsewhere:
            pick_teacher_device(recipe)
            if self.accelerator.num_processes > 1:
                raise ConfigError("model.teacher_device is one GPU for one process; leave it out with several")
        torch.manual_seed(recipe.runtime.seed)
        rows = open_rows(recipe)
        self.student = open_student(recipe, rows)
        self.plan = plan_for(recipe, (self.student.model, self.student.adapter))
        check_relational_layer(recipe, self.student.model)
        choose_trained(recipe, self.student)
        cache_bytes = int(recipe.runtime.tower_cache_gib * GIB)
        trained_tower = recipe.model.train == "all"
        self.vision = VisionFeatures(self.student.adapter, self.student.model, cache_bytes, trained_tower)
        self.masters = Masters(
            self.student.model,
            self.plan,
            scale_init=recipe.quant.scale_init,
            clip_mask=recipe.quant.clip_mask,
            scale_gradient=recipe.quant.scale_gradient,
        )
        self.optimizer = Optimizer(self.masters, recipe.optim)
        self.teacher = self._open_teacher(cache_bytes)
        self.adaptive = self._adaptive_weight()
        self.ledger = Ledger(out / "ledger.jsonl")
        self.loader = open_loader(
            recipe,
            rows,
            self.student,
            self.ledger,
            self.accelerator.device,
            # Without a cache there is nothing to ask, and workers could not.
            keeps=self._keeps_features if recipe.runtime.tower_cache_gib else None,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.stepper = Stepper(
            recipe,
            self.student,
            self.vision,
            self.masters,
            self.optimizer,
            self.teacher,
            self.adaptive,
            self.accelerator,
        )
        if self.accelerator.device.type == "cuda":
            # A whole BF16 gradient of a table of words is what a small GPU runs out at.
            sum_look_ups(self.student.model, self.masters.accumulator)
        if recipe.runtime.gradient_checkpointing and trained_tower:
            recompute_tower(self.student.model)
        if recipe.runtime.compile and self.accelerator.device.type == "cuda":
            compile_layers(self.student.model)
            if self.teacher is not None:
                self.teacher.compile_layers()
        if recipe.runtime.cuda_graphs and self.accelerator.device.type == "cuda":
            sums = self.masters.sums_of(self.student.model.model.language_model.layers)
            memory = graph_layers(self.student.model, sums)
            if self.teacher is not None:
                self.teacher.graph_layers(memory)

    def _keeps_features(self, name: str) -> bool:
        return self.vision.keeps(name) and (self.teacher is None or self.teacher.keeps(name))

    def _open_teacher(self, cache_bytes: int) -> Teacher | None:
        if not self.recipe.objective().needs_teacher:
            return None
        if self.recipe.model.teacher_cache is not None:
            return open_cached_teacher(self.recipe, self.student)
        loaded = open_teacher(self.recipe, self.student)
        if loaded is None:
            return None
        check_relational_layer(self.recipe, loaded.model)
        layer, where = self.recipe.loss.relational_layer, next(self.student.model.parameters()).device
        return OnlineTeacher(loaded, self.recipe.objective(), layer, cache_bytes, where)

    def _adaptive_weight(self) -> AdaptiveWeight | None:
        if self.recipe.method != "grace" or not self.recipe.loss.adaptive:
            return None
        return AdaptiveWeight(**self.recipe.loss.adaptive_weight.model_dump())

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resume to be exact."""
        cache = self.recipe.model.teacher_cache if isinstance(self.teacher, CachedTeacher) else None
        return {
            "recipe_sha256": hashlib.sha256(dump_recipe(self.recipe).encode()).hexdigest()[:16],
            "num_processes": self.accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({} if cache is None else {"teacher_cache": sha256_file(Path(cache) / CACHE_FILE)[:16]}),
        }

    def state(self, step: int) -> TrainState:
        """Everything that decides the rest of the run, after ``step`` optimizer steps."""
        return TrainState(
            step=step,
            masters={name: tensor.detach() for name, tensor in self.masters.masters()},
            # Copies: they are views of one buffer, which a file of tensors cannot hold.
            log_scales={name: tensor.detach().clone() for name, tensor in self.masters.log_scales()},
            optimizer_tensors=self.optimizer.state_dict(),
            adaptive_weight=self.adaptive.state_dict() if self.adaptive else {},
            sampler=self.loader.state_dict(),
            rng=capture_rng(),
            fingerprint=self.fingerprint(),
        )

    def restore(self) -> int:
        """Load the newest complete checkpoint; returns the number of steps done (0: none found)."""
        path, skipped = find_checkpoint(self.out / "checkpoints")
        for folder, reason in skipped:
            self.notify(f"skipped {folder.name}: {reason}")
        if path is None:
            return 0
        state = load_checkpoint(path)
        require_same(self.fingerprint(), state.fingerprint)
        self.masters.load_state_dict(state.masters, state.log_scales)
        self.optimizer.load_state_dict(state.optimizer_tensors)
        if self.adaptive:
            self.adaptive.load_state_dict(state.adaptive_weight)
        self.loader.load_state_dict(state.sampler)
        restore_rng(state.rng)
        self.notify(f"resumed from {path.name}")
        return state.step

    def steps(self, first: int, recorder: Recorder, progress: Progress) -> None:
        """Run the optimizer steps from ``first`` on, recording and saving.

        A step is read when the next one has been queued, or at once where it is followed by a checkpoint.
        """
        runtime, num_steps = self.recipe.runtime, self.recipe.optim.num_steps
        last_read = time.perf_counter()

        def read(pending: PendingStep) -> None:
            nonlocal last_read
            report = pending.resolve()
            now = time.perf_counter()
            if self._is_recorded(report.step):
                recorder.add(self._line(report, now - last_read))
            last_read = now
            progress(report, num_steps)

        pending: PendingStep | None = None
        for step in range(first, num_steps):
            batches = [self.loader.next() for _ in range(self.recipe.data.accumulation)]
            queued = self.stepper.launch(step, batches, count_flips=self._is_recorded(step))
            if pending is not None:
                read(pending)
            pending, done = queued, step + 1
            if runtime.checkpoint_every_steps and done % runtime.checkpoint_every_steps == 0 and done < num_steps:
                read(pending)
                pending = None
                save_checkpoint(self.out / "checkpoints", done, self.state(done), runtime.keep_checkpoints)
                last_read = time.perf_counter()
        if pending is not None:
            read(pending)

    def _is_recorded(self, step: int) -> bool:
        return step % self.recipe.runtime.record_every_steps == 0 or step == self.recipe.optim.num_steps - 1

    def _line(self, report: StepReport, seconds: float) -> dict[str, Any]:
        line = dataclasses.asdict(report)
        if self.masters.num_codes:
            line["codes_flipped_fraction"] = report.codes_flipped / self.masters.num_codes
        else:
            del line["codes_flipped"], line["scale_drift"]
        line["tokens_per_second"] = round(report.tokens / seconds, 1)
        return line

    def stored_plan(self) -> dict[str, Any]:
        """The plan in the names that files have."""
        return self.plan.to_json(functools.partial(stored_name, self.student.adapter))

    def publish(self) -> Path:
        """Write ``final/``; the model folder of the run."""
        lines = read_metrics(self.out / "metrics.jsonl")
        return publish_model(
            self.out / "final",
            self.student.model,
            self.student.processor,
            self.masters.quantized(),
            self.plan.bf16_names if self.plan.schemes else (),
            model_card(self.recipe, self.plan, lines[-1] if lines else None, len(self.ledger.faults)),
            overwrite=True,
        )


def recompute_tower(model: Any) -> None:
    """Let a trained vision tower keep no activations; the decoder's are ours to choose (``models/decoder.py``)."""
    # Renamed in Transformers 5.2x; 5.17 has the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.model.language_model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    # Transformers recomputes only in training mode, which must change nothing else.
    model.train()
    active = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if active:
        raise ConfigError(f"{active[0]} has dropout; set it to 0 in config.json, a resumed run must repeat itself")


def prepare_run_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Make ``out`` ready: refuse an existing run, or clear it if ``overwrite``."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; expected a folder for the run")
    if resume:
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists; pass --resume to go on, --overwrite to start again, or another --out")
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is no run folder (no config.yaml); it is not overwritten: choose another --out")
    shutil.rmtree(out)


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
    prepare_run_folder(out, resume, overwrite)
    final = out / "final"
    is_new = not out.exists()
    with FolderLock(out):
        if resume and (final / "manifest.json").is_file():
            stored = (out / "config.yaml").read_text(encoding="utf-8")
            if stored != dump_recipe(recipe):
                raise CheckpointError(f"{out} is a finished run of another recipe; choose another --out or --overwrite")
            notify(f"{out} is complete")
            return final
        for stale in (*sweep_partials(out), *sweep_partials(out / "checkpoints")):
            notify(f"removed {stale.name}, left by an interrupted save")
        try:
            run = Run(recipe, out, notify)
        except GraceError:
            # What cannot start leaves nothing behind.
            if is_new:
                shutil.rmtree(out)
            raise
        first = run.restore() if resume else 0
        for line in run.plan.summary():
            notify(f"plan: {line}")
        write_bytes_atomic(out / "config.yaml", dump_recipe(recipe).encode())
        write_bytes_atomic(out / "plan.json", (json.dumps(run.stored_plan(), indent=1) + "\n").encode())
        recorder = Recorder(out, first, recipe.runtime.trackers, recipe.model_dump(mode="json"))
        try:
            run.steps(first, recorder, progress)
            run.publish()
        finally:
            recorder.close()
            run.loader.close()
    return final
