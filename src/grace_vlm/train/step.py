"""One optimizer step: teacher first, then the student's micro-batches, then one backward through the grid.

    1. teacher over all micro-batches           -> a TeacherSignal each, and the normalisers of the step
    2. student forward and backward, each       -> dL/dleaf, accumulated in FP32
    3. one straight-through backward            -> gradients of masters and log-scales; clip
    4. one read of all measurements; if any is not finite: stop, with the weights of before the step
    5. optimizer, then the leaves are written once from the masters

Everything that is normalised over the step is summed first and reduced over ranks, unconditionally, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate import Accelerator

from grace_vlm.data.collate import Batch
from grace_vlm.errors import ConfigError, NonFiniteError
from grace_vlm.losses.controller import AdaptiveWeight
from grace_vlm.losses.linear_gdkd import unknown_target
from grace_vlm.losses.objective import LossTerms, Normalizers, compute_terms
from grace_vlm.losses.signal import TeacherSignal
from grace_vlm.models.adapter import plain_head
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.vision import VisionFeatures
from grace_vlm.train.config import LossConfig, Recipe
from grace_vlm.train.masters import Masters
from grace_vlm.train.optim import Optimizer
from grace_vlm.train.teacher import OnlineTeacher


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step measured, over all micro-batches and ranks.

    ``distillation`` is the unscaled GDKD (T^2 included), ``relational`` the mean of 1 - CKA; a term that the method
    lacks is None. ``weight`` is the beta that was in force. ``codes_flipped`` is 0 where they were not counted.
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


def ramp(step: int, warmup_steps: int) -> float:
    """Linear warm-up of a loss term: clamp(step / W, 0, 1); W = 0 means 1 (GRACE eq. 21, code)."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


@dataclass
class _Measured:
    """Sums over one micro-batch, as device scalars: read by the host once a step."""

    NAMES: ClassVar = ("cross_entropy", "distillation", "relational", "images", "teacher gate")

    terms: LossTerms
    gate_sum: torch.Tensor
    batch: Batch

    def row(self) -> torch.Tensor:
        """(5,) FP64, in the order of ``NAMES``."""
        terms = self.terms
        return torch.stack(
            [
                terms.cross_entropy.double(),
                terms.distillation.double(),
                terms.relational.double(),
                terms.images.double(),
                self.gate_sum,
            ]
        )


class Stepper:
    """Runs optimizer steps for one recipe. Holds no state of its own but what it is given."""

    def __init__(
        self,
        recipe: Recipe,
        student: LoadedModel,
        vision: VisionFeatures,
        masters: Masters,
        optimizer: Optimizer,
        teacher: OnlineTeacher | None,
        adaptive: AdaptiveWeight | None,
        accelerator: Accelerator,
    ) -> None:
        self.recipe, self.student, self.vision = recipe, student, vision
        self.masters, self.optimizer, self.teacher, self.adaptive = masters, optimizer, teacher, adaptive
        self.accelerator = accelerator
        self.objective = recipe.objective()
        self.head = plain_head(student.adapter.head(student.model), "student")
        self.head_gradient = masters.accumulator(self.head)
        self.device = next(student.model.parameters()).device

    @property
    def loss_config(self) -> LossConfig:
        return self.recipe.loss

    def distillation_weight(self) -> float:
        """beta in force: the adaptive one, or the fixed one."""
        return self.adaptive.value if self.adaptive is not None else self.loss_config.fixed_weight

    def run(self, step: int, batches: list[Batch], count_flips: bool = False) -> StepReport:
        """One optimizer step (0-based ``step``); ``NonFiniteError`` leaves every weight as it was."""
        for batch in batches:
            self._require_known_targets(batch)
        local = [batch.to(self.device) for batch in batches]
        signals = [self.teacher.signal(batch) for batch in local] if self.teacher else [None] * len(local)
        counts = [self._counts(batch, signal) for batch, signal in zip(local, signals, strict=True)]
        whole = self.accelerator.reduce(torch.stack(counts).sum(dim=0), reduction="sum")
        measured = []
        for batch, signal, own in zip(local, signals, counts, strict=True):
            terms = self._forward_backward(step, batch, signal, own, whole, len(local))
            measured.append(_Measured(terms, own[1], batch))
        for accumulator in self.masters.accumulators():
            if self.accelerator.num_processes > 1:
                accumulator.copy_(self.accelerator.reduce(accumulator, reduction="sum"))
        self.masters.collect()
        grad_norm = self.optimizer.clip()
        values, norm = self._read(step, measured, grad_norm)
        rate = self.optimizer.step(step)
        flipped = self.masters.materialize(count_flips)
        return self._report(step, local, values, whole.tolist(), norm, rate, flipped)

    def _require_known_targets(self, batch: Batch) -> None:
        """``ConfigError`` for a target that a head lacks; labels are still on the host, so nothing waits."""
        heads = [self.head, *([self.teacher.head] if self.teacher else [])]
        num_shared = min(head.shape[0] for head in heads)
        if not batch.targets.is_cuda and batch.targets.numel() and int(batch.targets.max()) >= num_shared:
            raise ConfigError(
                f"{unknown_target(int(batch.targets.max()), num_shared)} (samples {', '.join(batch.sample_ids)})"
            )

    def _counts(self, batch: Batch, signal: TeacherSignal | None) -> torch.Tensor:
        """(tokens, sum of gate, images) of a micro-batch, FP64 so that sums over ranks are exact."""
        gate = signal.gate.double().sum() if signal else torch.zeros((), dtype=torch.float64, device=self.device)
        images = sum(length >= self.objective.min_tokens for length in batch.image_lengths)
        host = torch.tensor([batch.targets.numel(), images], dtype=torch.float64, device=self.device)
        return torch.stack([host[0], gate, host[1]])

    def _forward_backward(
        self,
        step: int,
        batch: Batch,
        signal: TeacherSignal | None,
        own: torch.Tensor,
        whole: torch.Tensor,
        num_micro_batches: int,
    ) -> LossTerms:
        objective, config = self.objective, self.loss_config
        states = self.student.adapter.decode(
            self.student.model,
            batch.input_ids,
            batch.position_ids,
            self.vision.of(batch.pictures),
            tap=config.relational_layer if objective.is_relational and batch.pictures else None,
            segments=batch.segments,
        )
        hidden = states.last.reshape(-1, states.last.shape[-1])[batch.supervised]
        per_step = config.normalization == "global"
        # Micro-batch normalisation averages over micro-batches and ranks, as the official trainer does.
        counts = (whole if per_step else own * (num_micro_batches * self.accelerator.num_processes)).float()
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
            teacher_head=self.teacher.head_on(self.device) if self.teacher else None,
            signal=signal,
            image_lengths=batch.image_lengths,
            head_gradient=self.head_gradient,
        )
        terms.total.backward()
        return terms

    def _read(self, step: int, measured: list[_Measured], grad_norm: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The step's one host read: (5,) sums (``_Measured.NAMES``) over micro-batches and ranks, and the gradient
        norm; all finite."""
        table = torch.stack([m.row() for m in measured])
        host = torch.cat([table.flatten(), grad_norm.double().reshape(1)]).cpu()
        local, norm = host[:-1].reshape(table.shape), float(host[-1])
        reduced = self.accelerator.reduce(table.sum(dim=0), reduction="sum").cpu()
        for row, m in zip(local, measured, strict=True):
            bad = [name for name, value in zip(_Measured.NAMES, row.tolist(), strict=True) if not math.isfinite(value)]
            if bad:
                raise NonFiniteError(
                    f"step {step}: {bad[-1] if 'teacher gate' in bad else bad[0]} is not finite for samples "
                    f"{', '.join(m.batch.sample_ids)}; the weights are those of before the step"
                )
        if not math.isfinite(norm) or not bool(torch.isfinite(reduced).all()):
            raise NonFiniteError(
                f"step {step}: the gradient is not finite for samples "
                f"{', '.join(name for m in measured for name in m.batch.sample_ids)}; "
                "the weights are those of before the step"
            )
        return reduced, norm

    def _report(
        self,
        step: int,
        batches: list[Batch],
        sums: torch.Tensor,
        counts: list[float],
        norm: float,
        rate: float,
        flipped: int,
    ) -> StepReport:
        cross_entropy_sum, distillation_sum, relational_sum, images_in, _ = sums.tolist()
        tokens, gate_sum, images = counts
        cross_entropy = cross_entropy_sum / max(tokens, 1.0)
        distillation = distillation_sum / max(gate_sum, 1e-8) if self.objective.needs_teacher else None
        relational = relational_sum / max(images_in, 1.0) if self.objective.is_relational else None
        weight = self.distillation_weight() if self.objective.needs_teacher else None
        loss = cross_entropy
        if distillation is not None and weight is not None:
            loss += weight * ramp(step, self.loss_config.distillation_warmup_steps) * distillation
        if relational is not None:
            omega = self.objective.relational_weight
            loss += ramp(step, self.loss_config.relational_warmup_steps) * omega * relational
        if self.adaptive is not None and distillation is not None and gate_sum > 0:
            self.adaptive.update(distillation)
        return StepReport(
            step=step,
            loss=loss,
            cross_entropy=cross_entropy,
            distillation=distillation,
            relational=relational,
            gate_mean=gate_sum / max(tokens, 1.0) if self.objective.is_gated else None,
            weight=weight,
            grad_norm=norm,
            learning_rate=rate,
            supervised_tokens=int(tokens),
            tokens=sum(batch.num_tokens for batch in batches),
            images=int(images),
            images_in_relation=int(images_in),
            codes_flipped=flipped,
        )
