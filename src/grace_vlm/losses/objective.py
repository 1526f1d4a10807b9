"""The total loss of a micro-batch (GRACE eq. 21), as terms with their normalisers.

    L = L_CE + beta a_kd(t) L_GDKD + omega a_rel(t) L_RCKA

Every term is a sum over this micro-batch divided by a normaliser that the caller gives: the count (or sum of the
gate) over all micro-batches and ranks of the optimizer step. Then the gradients of the micro-batches simply add, and
a token weighs the same wherever it stands. With the micro-batch's own counts instead, the official arithmetic is
reproduced (``normalization=microbatch``), where a token of a 30-token micro-batch weighs 31 times one of a
1,000-token micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from grace_vlm.losses.gdkd import VocabularyPolicy, confidence_gate, gated_decoupled_kd
from grace_vlm.losses.rcka import relational_cka_sum
from grace_vlm.losses.signal import TeacherSignal

Method = Literal["sft", "qat", "kd", "grace"]


@dataclass(frozen=True)
class Objective:
    """Which terms a method has, and their fixed weights.

    Args:
        method: ``sft`` and ``qat`` have cross-entropy only; ``kd`` adds T^2 KL(q || p), plain; ``grace`` the rest.
        gate, decoupled, relational: the parts of ``grace`` that can be switched off.
        temperature, tckd_weight, nckd_weight: T, a, b of eq. 3.
        relational_weight: omega.
        min_tokens: images with fewer visual tokens stay out of the relation loss.
        vocabulary: what to do with heads of different width.
    """

    method: Method
    gate: bool = True
    decoupled: bool = True
    relational: bool = True
    temperature: float = 2.0
    tckd_weight: float = 1.0
    nckd_weight: float = 4.0
    relational_weight: float = 3.0
    min_tokens: int = 4
    vocabulary: VocabularyPolicy = "equal"

    @property
    def needs_teacher(self) -> bool:
        return self.method in ("kd", "grace")

    @property
    def is_gated(self) -> bool:
        return self.method == "grace" and self.gate

    @property
    def is_relational(self) -> bool:
        return self.method == "grace" and self.relational

    def gate_of(self, teacher_logits: torch.Tensor) -> torch.Tensor:
        """The token weights of the distillation term, (N,) FP32: the gate, or ones."""
        if self.is_gated:
            return confidence_gate(teacher_logits)
        return torch.ones(teacher_logits.shape[0], dtype=torch.float32, device=teacher_logits.device)


@dataclass(frozen=True)
class Normalizers:
    """Counts of an optimizer step (or of a micro-batch), as scalar tensors: tokens, sum of gate, images."""

    tokens: torch.Tensor
    gate: torch.Tensor
    images: torch.Tensor


@dataclass(frozen=True)
class LossTerms:
    """One micro-batch's loss.

    Args:
        total: scalar with graph, what backward is called on.
        cross_entropy, distillation, relational: scalar sums over this micro-batch, detached, **not** normalised
            (distillation includes T^2 and the gate), so that they add up over micro-batches and ranks.
        images: number of images that entered the relation loss.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    distillation: torch.Tensor
    relational: torch.Tensor
    images: torch.Tensor


def compute_terms(
    objective: Objective,
    student_logits: torch.Tensor,
    targets: torch.Tensor,
    normalizers: Normalizers,
    *,
    distillation_weight: float = 0.0,
    relational_ramp: float = 1.0,
    student_relational: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    signal: TeacherSignal | None = None,
    image_lengths: Sequence[int] = (),
) -> LossTerms:
    """All terms of one micro-batch.

    Args:
        student_logits: (n_supervised, V). targets: (n_supervised,) next tokens, all valid.
        distillation_weight: beta times its warm-up. relational_ramp: the warm-up a_rel(t); omega is in ``objective``.
        student_relational: (n_visual, d_s) at the tapped layer. teacher_logits: (n_supervised, V).
        signal: the teacher's record; None for ``sft`` and ``qat``.
    """
    zero = torch.zeros((), dtype=torch.float32, device=student_logits.device)
    cross_entropy = F.cross_entropy(student_logits.float(), targets, reduction="sum")
    total = cross_entropy / normalizers.tokens.clamp_min(1.0)
    distillation, relational, images = zero, zero, zero
    if objective.needs_teacher:
        assert teacher_logits is not None
        assert signal is not None
        terms = gated_decoupled_kd(
            student_logits,
            teacher_logits,
            targets,
            temperature=objective.temperature,
            tckd_weight=objective.tckd_weight,
            nckd_weight=objective.nckd_weight,
            normalizer=1.0,
            gate=signal.gate,
            decoupled=objective.method == "grace" and objective.decoupled,
            vocabulary=objective.vocabulary,
        )
        distillation = terms.loss
        total = total + distillation_weight * distillation / normalizers.gate.clamp_min(1e-8)
    if objective.is_relational:
        assert student_relational is not None
        assert signal is not None
        relational, images = relational_cka_sum(
            student_relational, signal.relational, image_lengths, min_tokens=objective.min_tokens
        )
        scale = relational_ramp * objective.relational_weight
        total = total + scale * relational / normalizers.images.clamp_min(1.0)
    return LossTerms(total, cross_entropy.detach(), distillation.detach(), relational.detach(), images.detach())
