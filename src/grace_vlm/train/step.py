"""One optimizer step: teacher first, then the student's micro-batches, then one backward through the grid.

    1. teacher over all micro-batches           -> a TeacherSignal each, and the normalisers of the step
    2. student forward and backward, each       -> dL/dleaf, accumulated in FP32
    3. one straight-through backward            -> gradients of masters and log-scales; clip
    4. optimizer, unless a number was not finite, now or before: then every weight stays as it is
    5. the leaves are written once from the masters, of several processes each its rows, which are gathered until the
       next step's student needs them; all measurements start on their way to the host

Everything that is normalised over the step is summed first and reduced over ranks, unconditionally, once.

The host reads one vector a step, when it likes (``PendingStep``): the loop reads it after the next step has been
queued, so the GPU never waits for the host to look. What stops the optimizer is therefore a flag on the device, which
stays up once it is up: of the step after a bad one nothing is learned either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from grace_vlm.data.collate import Batch, grouped
from grace_vlm.errors import ConfigError, NonFiniteError, OtherProcessError
from grace_vlm.losses.controller import AdaptiveWeight
from grace_vlm.losses.linear_gdkd import unknown_target
from grace_vlm.losses.objective import LossTerms, Normalizers, compute_terms
from grace_vlm.losses.signal import TeacherSignal
from grace_vlm.models.adapter import TowerOutput, plain_head
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.vision import VisionFeatures
from grace_vlm.train.config import LossConfig, Recipe
from grace_vlm.train.masters import Masters
from grace_vlm.train.optim import Optimizer
from grace_vlm.train.ranks import Ranks
from grace_vlm.train.teacher import Teacher


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step measured, over all micro-batches and ranks.

    ``distillation`` is the unscaled GDKD (T^2 included), ``relational`` the mean of 1 - CKA; a term that the method
    lacks is None. ``weight`` is the beta that was in force. ``codes_flipped`` and ``scale_drift`` (mean
    |log s - log s_0| over all groups) are 0 where they were not counted.
    """

    step: int
    loss: float
    cross_entropy: float
    distillation: float | None
    relational: float | None
    gate_mean: float | None
    weight: float | None
    grad_norm: float
    learning_rate: float
    supervised_tokens: int
    tokens: int
    images: int
    images_in_relation: int
    codes_flipped: int
    scale_drift: float
    stop: int
    """Asked for by so many processes."""
    num_bad: int
    """Rows in the ledgers; one that two processes met in different epochs counts twice."""


def ramp(step: int, warmup_steps: int) -> float:
    """Linear warm-up of a loss term: clamp(step / W, 0, 1); W = 0 means 1 (GRACE eq. 21, code)."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


TERMS = ("cross_entropy", "distillation", "relational", "images", "teacher gate")
"""What is measured of a micro-batch, as sums."""


def _row(terms: LossTerms, gate_sum: torch.Tensor) -> torch.Tensor:
    """(5,) FP64 on the device, in the order of ``TERMS``."""
    sums = (terms.cross_entropy, terms.distillation, terms.relational, terms.images, gate_sum)
    return torch.stack([value.double() for value in sums])


class PendingStep:
    """A step that is queued, with its measurements on their way to the host.

    Args:
        values: FP64 vector on the device: (micro-batches, 5) rows of ``TERMS``, their (5,) sums over ranks, and the
            ``LAST`` scalars.
        sample_ids: of each micro-batch. rate: learning rate of the masters.
    """

    LAST: ClassVar = (
        *("tokens", "gate", "images", "all_tokens", "stop", "num_bad"),
        *("weight", "norm", "codes_flipped", "scale_drift", "scales_finite"),
    )

    def __init__(
        self,
        recipe: Recipe,
        step: int,
        values: torch.Tensor,
        sample_ids: list[tuple[str, ...]],
        rate: float,
        num_processes: int,
    ) -> None:
        self.recipe, self.step, self.sample_ids, self.rate = recipe, step, sample_ids, rate
        self.num_processes = num_processes
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def resolve(self) -> StepReport:
        """Wait for the measurements: the step's one host read.

        Raises:
            NonFiniteError: a measurement is not finite; every weight is what it was before that step.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        num = len(self.sample_ids)
        table = self._values[: 5 * num].view(num, 5)
        sums = self._values[5 * num : 5 * num + 5].tolist()
        last = dict(zip(self.LAST, self._values[5 * num + 5 :].tolist(), strict=True))
        self._require_finite(table.tolist(), sums, last["norm"], last["scales_finite"] == 1.0)
        return self._report(sums, last)

    def _require_finite(self, table: list[list[float]], sums: list[float], norm: float, scales_finite: bool) -> None:
        kept = "the weights are those of before the step"
        everything = ", ".join(name for names in self.sample_ids for name in names)
        if not scales_finite:
            raise NonFiniteError(f"step {self.step}: a log-scale is not finite before samples {everything}; {kept}")
        for row, names in zip(table, self.sample_ids, strict=True):
            bad = [term for term, value in zip(TERMS, row, strict=True) if not math.isfinite(value)]
            if bad:
                term = bad[-1] if "teacher gate" in bad else bad[0]
                raise NonFiniteError(f"step {self.step}: {term} is not finite for samples {', '.join(names)}; {kept}")
        elsewhere = [term for term, value in zip(TERMS, sums, strict=True) if not math.isfinite(value)]
        if elsewhere:
            raise OtherProcessError(f"step {self.step}: {elsewhere[0]} is not finite on another process; {kept}", 6)
        if not math.isfinite(norm):
            others = " or those of another process" if self.num_processes > 1 else ""
            raise NonFiniteError(
                f"step {self.step}: the gradient is not finite for samples {everything}{others}; {kept}"
            )

    def _report(self, sums: list[float], last: dict[str, float]) -> StepReport:
        objective, config = self.recipe.objective(), self.recipe.loss
        cross_entropy_sum, distillation_sum, relational_sum, images_in, _ = sums
        tokens, gate_sum, images = last["tokens"], last["gate"], last["images"]
        cross_entropy = cross_entropy_sum / max(tokens, 1.0)
        distillation = distillation_sum / max(gate_sum, 1e-8) if objective.needs_teacher else None
        relational = relational_sum / max(images_in, 1.0) if objective.is_relational else None
        weight = last["weight"] if objective.needs_teacher else None
        loss = cross_entropy
        if distillation is not None and weight is not None:
            loss += weight * ramp(self.step, config.distillation_warmup_steps) * distillation
        if relational is not None:
            loss += ramp(self.step, config.relational_warmup_steps) * objective.relational_weight * relational
        return StepReport(
            step=self.step,
            loss=loss,
            cross_entropy=cross_entropy,
            distillation=distillation,
            relational=relational,
            gate_mean=gate_sum / max(tokens, 1.0) if objective.is_gated else None,
            weight=weight,
            grad_norm=last["norm"],
            learning_rate=self.rate,
            supervised_tokens=int(tokens),
            tokens=int(last["all_tokens"]),
            images=int(images),
            images_in_relation=int(images_in),
            codes_flipped=int(last["codes_flipped"]),
            scale_drift=last["scale_drift"],
            stop=int(last["stop"]),
            num_bad=int(last["num_bad"]),
        )


class Stepper:
    """Queues optimizer steps for one recipe. Its own state is the flag that a number was not finite."""

    def __init__(
        self,
        recipe: Recipe,
        student: LoadedModel,
        vision: VisionFeatures,
        masters: Masters,
        optimizer: Optimizer,
        teacher: Teacher | None,
        adaptive: AdaptiveWeight | None,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.student, self.vision = recipe, student, vision
        self.masters, self.optimizer, self.teacher = masters, optimizer, teacher
        self.ranks = ranks
        self.objective = recipe.objective()
        self.head = plain_head(student.adapter.head(student.model), "student")
        self.head_gradient = masters.accumulator(self.head)
        self.device = next(student.model.parameters()).device
        self.adaptive = adaptive.to(self.device) if adaptive is not None else None
        num_layers = student.model.config.text_config.num_hidden_layers
        self.recompute = recipe.runtime.recomputed_layers(num_layers)
        self._stopped = torch.zeros((), dtype=torch.float32, device=self.device)
        optimizer.guard(self._stopped)

    @property
    def loss_config(self) -> LossConfig:
        return self.recipe.loss

    def distillation_weight(self) -> torch.Tensor:
        """beta in force, an FP64 scalar on the device: the adaptive one, or the fixed one."""
        if self.adaptive is not None:
            return self.adaptive.tensor
        return self._scalar(self.loss_config.fixed_weight)

    def run(self, step: int, batches: list[Batch], count_flips: bool = False) -> StepReport:
        """One optimizer step (0-based ``step``), waited for; ``NonFiniteError`` leaves every weight as it was."""
        report = self.launch(step, batches, count_flips).resolve()
        self.masters.settle()
        return report

    def launch(
        self, step: int, batches: list[Batch], count_flips: bool = False, stop_asked: bool = False, num_bad: int = 0
    ) -> PendingStep:
        """Queue one optimizer step; nothing is read from the device.

        Args:
            count_flips: measure codes and scales too. stop_asked, num_bad: what the other processes are to know.
        """
        for batch in batches:
            self._require_known_targets(batch)
        max_tokens = self.recipe.runtime.frozen_batch_tokens
        local = [batch.to(self.device) for batch in batches]
        signals = self.teacher.signals(batches, max_tokens) if self.teacher else [None] * len(batches)
        counts = [self._counts(batch, signal) for batch, signal in zip(batches, signals, strict=True)]
        told = [sum(batch.num_tokens for batch in batches), int(stop_asked), num_bad]
        told_here = torch.stack([self._scalar(float(number)) for number in told])
        whole = self.ranks.sum_(torch.cat([torch.stack(counts).sum(dim=0), told_here]))
        self.masters.settle()
        rows, at = [], 0
        for group in grouped(local, max_tokens):
            for batch, vision in zip(group, self._vision(group), strict=True):
                rows.append(self._forward_backward(step, batch, vision, signals[at], counts[at], whole, len(batches)))
                at += 1
        self.masters.collect()
        norm, scales_finite = self.masters.shared_norm()
        self.optimizer.clip(norm)
        norm = norm.double()
        sums = self.ranks.sum_(torch.stack(rows).sum(dim=0))
        is_finite = sums.isfinite().all() & norm.isfinite() & scales_finite
        self._stopped.clamp_(min=(~is_finite).float())
        rate = self.optimizer.step(step)
        weight = self.distillation_weight()
        self._advance_weight(sums, whole)
        # A sum, so before the leaves begin to be gathered: what comes after them waits for them.
        drift = self.masters.scale_drift() if count_flips else self._scalar(0.0)
        flipped = self.masters.materialize(count_flips)
        last = torch.stack([*whole, weight, norm, flipped.double(), drift.double(), scales_finite.double()])
        return PendingStep(
            self.recipe,
            step,
            torch.cat([*rows, sums, last]),
            [batch.sample_ids for batch in batches],
            rate,
            self.ranks.count,
        )

    def _scalar(self, value: float) -> torch.Tensor:
        """An FP64 scalar on the device, by a kernel: a copy of one would be waited for."""
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def _require_known_targets(self, batch: Batch) -> None:
        """``ConfigError`` for a target that a head lacks; labels are still on the host, so nothing waits."""
        if batch.targets.is_cuda or not batch.targets.numel():
            return
        heads = [self.head, *([self.teacher.head] if self.teacher else [])]
        num_shared, largest = min(head.shape[0] for head in heads), int(batch.targets.numpy().max())
        if largest >= num_shared:
            raise ConfigError(f"{unknown_target(largest, num_shared)} (samples {', '.join(batch.sample_ids)})")

    def _counts(self, batch: Batch, signal: TeacherSignal | None) -> torch.Tensor:
        """(tokens, sum of gate, images) of a micro-batch, FP64 so that sums over ranks are exact."""
        gate = signal.gate.double().sum() if signal else self._scalar(0.0)
        images = sum(length >= self.objective.min_tokens for length in batch.image_lengths)
        return torch.stack([self._scalar(batch.targets.numel()), gate, self._scalar(images)])

    def _vision(self, group: list[Batch]) -> list[list[TowerOutput] | None]:
        """What the frozen tower says of the pictures of some micro-batches, in one go; None where each micro-batch
        must ask for itself, because its gradients go through the tower."""
        if self.vision.trained:
            return [None] * len(group)
        outputs = iter(self.vision.of([picture for batch in group for picture in batch.pictures]))
        return [[next(outputs) for _ in batch.pictures] for batch in group]

    def _forward_backward(
        self,
        step: int,
        batch: Batch,
        vision: list[TowerOutput] | None,
        signal: TeacherSignal | None,
        own: torch.Tensor,
        whole: torch.Tensor,
        num_micro_batches: int,
    ) -> torch.Tensor:
        """Gradients of a micro-batch, to their sums; returns its row of ``TERMS``.

        Nothing of its graph may outlive this call: what leaves' gradients are made by is kept by any graph that uses
        it, with the stream it was made on, and a CUDA graph of the next micro-batch could not record it anew.
        """
        objective, config = self.objective, self.loss_config
        states = self.student.adapter.decode(
            self.student.model,
            batch.input_ids,
            batch.position_ids,
            self.vision.of(batch.pictures) if vision is None else vision,
            tap=config.relational_layer if objective.is_relational and batch.pictures else None,
            segments=batch.segments,
            visual=batch.visual,
            recompute=self.recompute,
        )
        hidden = states.last.flatten(0, 1).index_select(0, batch.supervised)
        per_step = config.normalization == "global"
        # Micro-batch normalisation averages over micro-batches and ranks, as the official trainer does.
        counts = (whole if per_step else own * (num_micro_batches * self.ranks.count)).float()
        relational = states.relational if states.relational is not None else hidden.new_zeros(0, hidden.shape[-1])
        terms = compute_terms(
            objective,
            hidden,
            self.head,
            batch.targets,
            Normalizers(tokens=counts[0], gate=counts[1], images=counts[2]),
            distillation_weight=self.distillation_weight() * ramp(step, config.distillation_warmup_steps),
            relational_ramp=ramp(step, config.relational_warmup_steps),
            student_relational=relational,
            teacher_head=self.teacher.head if self.teacher else None,
            signal=signal,
            image_lengths=batch.image_lengths,
            head_gradient=self.head_gradient,
        )
        if terms.total.requires_grad:  # rows without a picture teach nothing to a tower alone (model.train=vision)
            terms.total.backward()
        return _row(terms, own[1])

    def _advance_weight(self, sums: torch.Tensor, whole: torch.Tensor) -> None:
        if self.adaptive is not None:
            gate_sum = whole[1]
            self.adaptive.advance(sums[1] / gate_sum.clamp_min(1e-8), (gate_sum > 0) & (self._stopped == 0))
