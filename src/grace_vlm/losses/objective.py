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
from typing import Any, Literal

import torch
import torch.nn.functional as F

from grace_vlm.losses.gdkd import (
    GateSignal,
    VocabularyPolicy,
    align_vocabularies,
    confidence_gate,
    gated_decoupled_kd,
)
from grace_vlm.losses.linear_gdkd import linear_gate, linear_gdkd
from grace_vlm.losses.official import official_decoupled_kd, official_gate, official_logits
from grace_vlm.losses.rcka import relational_cka_sum
from grace_vlm.losses.signal import TeacherSignal

Method = Literal["sft", "qat", "kd", "grace"]
Implementation = Literal["fused", "reference", "official"]
"""How the vocabulary's part is computed. ``fused``: chunk by chunk, no (N, V) tensor. ``reference``: the same numbers
from whole FP32 logits by autograd. ``official``: the official code's roundings and clamps."""


@dataclass(frozen=True)
class Objective:
    """Which terms a method has, and their fixed weights.

    Args:
        method: ``sft`` and ``qat`` have cross-entropy only; ``kd`` adds T^2 KL(q || p), plain; ``grace`` the rest.
        gate, decoupled, relational: the parts of ``grace`` that can be switched off.
        gate_signal: what the gate is made of. gate_temperature: t of gate^(1/t); 1 is eq. 2, and below 1 a token that
            the teacher is unsure of weighs less: exp(-H / (t log|V|)).
        temperature, tckd_weight, nckd_weight: T, a, b of eq. 3.
        relational_weight: omega.
        min_tokens: images with fewer visual tokens stay out of the relation loss.
        vocabulary: what to do with heads of different width.
        implementation: see ``Implementation``; ``official`` has no plain KL.
        workspace_bytes: of logits that the fused implementation holds; None as in ``linear_gdkd``.
    """

    method: Method
    gate: bool = True
    decoupled: bool = True
    relational: bool = True
    gate_signal: GateSignal = "entropy"
    gate_temperature: float = 1.0
    temperature: float = 2.0
    tckd_weight: float = 1.0
    nckd_weight: float = 4.0
    relational_weight: float = 3.0
    min_tokens: int = 4
    vocabulary: VocabularyPolicy = "equal"
    implementation: Implementation = "fused"
    workspace_bytes: int | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.method in ("kd", "grace")

    @property
    def is_gated(self) -> bool:
        return self.method == "grace" and self.gate

    @property
    def is_decoupled(self) -> bool:
        return self.method == "grace" and self.decoupled

    @property
    def is_relational(self) -> bool:
        return self.method == "grace" and self.relational

    def gate_of(self, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor) -> torch.Tensor:
        """The token weights of the distillation term from (N, d_t) states and the head (V_t, d_t): the gate, or ones;
        (N,) FP32 (FP64 for FP64 states)."""
        if not self.is_gated:
            dtype = torch.float64 if teacher_hidden.dtype == torch.float64 else torch.float32
            return torch.ones(teacher_hidden.shape[0], dtype=dtype, device=teacher_hidden.device)
        gate = self._gate_of(teacher_hidden, teacher_head)
        return gate if self.gate_temperature == 1 else gate ** (1 / self.gate_temperature)

    def _gate_of(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        if self.implementation == "official":
            return official_gate(official_logits(hidden, head))
        if self.implementation == "reference":
            return confidence_gate(_reference_logits(hidden, head), self.gate_signal)
        return linear_gate(hidden, head, self.gate_signal, workspace_bytes=self.workspace_bytes)


@dataclass(frozen=True)
class Normalizers:
    """What the terms are divided by, scalar tensors: tokens, sum of the gate, images of an optimizer step."""

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
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    normalizers: Normalizers,
    *,
    distillation_weight: torch.Tensor | float = 0.0,
    relational_ramp: float = 1.0,
    student_relational: torch.Tensor | None = None,
    teacher_head: torch.Tensor | None = None,
    signal: TeacherSignal | None = None,
    image_lengths: Sequence[int] = (),
    head_gradient: torch.Tensor | None = None,
) -> LossTerms:
    """All terms of one micro-batch.

    Args:
        hidden: (n_supervised, d_s) last hidden states. head: (V, d_s). targets: (n_supervised,) next tokens, all valid.
        distillation_weight: beta times its warm-up, a number or a scalar tensor.
        relational_ramp: the warm-up a_rel(t); omega is in ``objective``.
        student_relational: (n_visual, d_s) at the tapped layer. teacher_head: (V_t, d_t).
        signal: the teacher's record; None for ``sft`` and ``qat``.
        head_gradient: (V, d_s) sum that the fused loss adds the head's gradient to (``linear_gdkd``); ``total`` must
            then go backward unscaled. The other implementations leave it alone and use autograd.
    """
    words = _fused_words if objective.implementation == "fused" else _whole_words
    tokens = _Tokens(hidden, head, targets, normalizers, distillation_weight, teacher_head, signal, head_gradient)
    total, cross_entropy, distillation = words(objective, tokens)
    relational = images = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if objective.is_relational:
        assert student_relational is not None
        assert signal is not None
        relational, images = relational_cka_sum(
            student_relational, signal.relational, image_lengths, min_tokens=objective.min_tokens
        )
        scale = relational_ramp * objective.relational_weight
        total = total + scale * relational / normalizers.images.clamp_min(1.0)
    return LossTerms(total, cross_entropy.detach(), distillation.detach(), relational.detach(), images.detach())


@dataclass(frozen=True)
class _Tokens:
    """What the vocabulary's part of the loss is made of; as in ``compute_terms``."""

    hidden: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    normalizers: Normalizers
    distillation_weight: torch.Tensor | float
    teacher_head: torch.Tensor | None
    signal: TeacherSignal | None
    head_gradient: torch.Tensor | None


_Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(weighted total with graph, cross-entropy sum, gated distillation sum): scalars."""


def _fused_words(objective: Objective, given: _Tokens) -> _Words:
    signal, normalizers = given.signal, given.normalizers
    assert signal is not None or not objective.needs_teacher
    gate = signal.gate if objective.needs_teacher and signal is not None else None
    weights = None if gate is None else given.distillation_weight * gate / normalizers.gate.clamp_min(1e-8)
    terms = linear_gdkd(
        given.hidden,
        given.head,
        given.targets,
        cross_entropy_weights=1.0 / normalizers.tokens.clamp_min(1.0),
        teacher_hidden=None if gate is None or signal is None else signal.hidden,
        teacher_head=None if gate is None else given.teacher_head,
        distillation_weights=weights,
        temperature=objective.temperature,
        tckd_weight=objective.tckd_weight,
        nckd_weight=objective.nckd_weight,
        decoupled=objective.is_decoupled,
        vocabulary=objective.vocabulary,
        head_gradient=given.head_gradient,
        workspace_bytes=objective.workspace_bytes,
    )
    distillation = terms.distillation.sum() if gate is None else (gate * terms.distillation).sum()
    return terms.loss, terms.cross_entropy.sum(), distillation


def _reference_logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(N, V) in FP32, or FP64 for FP64 states: not in BF16, whatever the head is."""
    if hidden.dtype == torch.float64:
        return F.linear(hidden, head)
    return F.linear(hidden.float(), head.float())


def _whole_words(objective: Objective, given: _Tokens) -> _Words:
    logits_of = official_logits if objective.implementation == "official" else _reference_logits
    logits = logits_of(given.hidden, given.head)
    cross_entropy = F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), given.targets, reduction="sum"
    )
    total = cross_entropy / given.normalizers.tokens.clamp_min(1.0)
    distillation = torch.zeros((), dtype=torch.float32, device=logits.device)
    if objective.needs_teacher:
        assert given.signal is not None
        assert given.teacher_head is not None
        teacher_logits = logits_of(given.signal.hidden, given.teacher_head)
        distillation = _whole_distillation(objective, logits, teacher_logits, given.targets, given.signal.gate)
        total = total + given.distillation_weight * distillation / given.normalizers.gate.clamp_min(1e-8)
    return total, cross_entropy, distillation


def _whole_distillation(
    objective: Objective,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """The gated sum of eq. 6, not normalised."""
    weights: dict[str, Any] = {
        "temperature": objective.temperature,
        "tckd_weight": objective.tckd_weight,
        "nckd_weight": objective.nckd_weight,
    }
    if objective.implementation == "official":
        assert objective.is_decoupled, "the official code has no plain KL"
        student, teacher = align_vocabularies(student_logits, teacher_logits, objective.vocabulary)
        return (gate * official_decoupled_kd(student, teacher, targets, **weights)).sum()
    return gated_decoupled_kd(
        student_logits,
        teacher_logits,
        targets,
        normalizer=1.0,
        gate=gate,
        decoupled=objective.is_decoupled,
        vocabulary=objective.vocabulary,
        **weights,
    ).loss
