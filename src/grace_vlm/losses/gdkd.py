"""Gated decoupled distillation, and plain distillation, on logits (GRACE eq. 1-6).

For one supervised token: target k, student logits z, teacher logits y, temperature T; p = softmax(z/T),
q = softmax(y/T), and hats for the distributions renormalised without class k.

    TCKD = KL([q_k, 1 - q_k] || [p_k, 1 - p_k])              is the target as likely for both?            (eq. 4)
    NCKD = KL(q^ || p^)                                      do both rank the other words alike?          (eq. 5)
    DKD  = T^2 (a TCKD + b NCKD)                             (eq. 3; T and T^2 stand in the code only)
    gate = exp(-H / log|V|),  H = entropy of softmax(y)      a confident teacher weighs more; in [1/e, 1] (eq. 1-2)
    L    = sum gate DKD / normalizer                         (eq. 6)

The target is masked out of every sum over the vocabulary and folded back afterwards. With

    A = logsumexp_{j != k} z_j/T,   B = logsumexp_{j != k} y_j/T,   u_s = z_k/T - A,   u_t = y_k/T - B

u is the logit of the binary problem (p_k = sigmoid(u_s)), and nothing is ever formed as 1 - p:

    TCKD = q_k (u_t - u_s) + softplus(u_s) - softplus(u_t)
    NCKD = sum_{j != k} q^_j (y_j - z_j)/T - B + A

The official code forms 1 - p in FP32 and clamps it at 1e-8: for a teacher with 1 - q_k <= 1e-4 its TCKD is off by 4 %,
below 1e-8 it is lost. For u_t > 0 the mirrored form of TCKD keeps every digit (``binary_kl``).
Also used: KL(q || p) = TCKD + (1 - q_k) NCKD, so plain KL is the same code with other weights.

FP64 inputs are computed in FP64, everything else in FP32. No gradient reaches the teacher or the gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from grace_vlm.errors import ConfigError

GateSignal = Literal["entropy", "margin"]
"""What a teacher's confidence is read from: its entropy (eq. 1), or the lead of its likeliest word."""
VocabularyPolicy = Literal["equal", "common"]
"""What to do when the two heads have different widths.

``equal``: an error. ``common``: both distributions are restricted to the leading words that both have (heads padded
to different multiples over one tokenizer); no probability is ever given to a word that one of them lacks.
"""


@dataclass(frozen=True)
class DistillationTerms:
    """Per-token divergences and the gated loss.

    Args:
        loss: scalar, T^2 sum gate (a TCKD + b NCKD) / normalizer.
        tckd, nckd: (N,), without T^2; 0 at ignored rows.
        gate: (N,), 0 at ignored rows; no gradient.
        gate_sum: scalar, sum of the gate.
    """

    loss: torch.Tensor
    tckd: torch.Tensor
    nckd: torch.Tensor
    gate: torch.Tensor
    gate_sum: torch.Tensor


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) without torch's cut-over to x above 20, which costs 2e-9."""
    return -F.logsigmoid(-x)


def binary_kl(u_teacher: torch.Tensor, u_student: torch.Tensor) -> torch.Tensor:
    """KL of two Bernoullis from their logits; exact for u_teacher large of either sign.

    The mirrored form swaps the classes: KL([q, 1-q] || [p, 1-p]) with u -> -u. Of the two, the one whose teacher
    probability is the smaller has no cancellation.
    """
    sign = torch.where(u_teacher > 0, -1.0, 1.0).to(u_teacher.dtype)
    teacher, student = sign * u_teacher, sign * u_student
    return torch.sigmoid(teacher) * (teacher - student) + softplus(student) - softplus(teacher)


def align_vocabularies(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, policy: VocabularyPolicy
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both logits over the same words, by ``policy``; ``ConfigError`` if widths differ under ``equal``."""
    student_width, teacher_width = student_logits.shape[-1], teacher_logits.shape[-1]
    if student_width == teacher_width:
        return student_logits, teacher_logits
    if policy == "equal":
        raise ConfigError(
            f"the student has {student_width} words and the teacher {teacher_width}; "
            "set loss.vocabulary=common if both use one tokenizer and only the padding differs"
        )
    width = min(student_width, teacher_width)
    return student_logits[..., :width], teacher_logits[..., :width]


def entropy_rows(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) at T = 1 in nats: (N, V) FP32 or FP64 -> (N,)."""
    return entropy_of(F.log_softmax(logits, dim=-1))


def entropy_of(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropy of log-probabilities in nats: (..., V) -> (...)."""
    # exp(-inf) * -inf is NaN; a word of probability 0 adds nothing to the entropy. A NaN logit stays a NaN.
    return -torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * log_probs).sum(dim=-1)


def gate_of_entropy(entropy: torch.Tensor, num_words: int) -> torch.Tensor:
    """exp(-H / log|V|) (eq. 1-2) of entropies in nats, any shape."""
    return torch.exp(-entropy / math.log(num_words))


def margin_rows(logits: torch.Tensor) -> torch.Tensor:
    """By how much the likeliest word leads: p_1 - p_2 of softmax(logits), (N, V) FP32 or FP64 -> (N,)."""
    best = logits.topk(2, dim=-1).values
    return torch.exp(best - logits.logsumexp(dim=-1, keepdim=True)).diff(dim=-1).squeeze(-1).neg()


def gate_of_margin(margin: torch.Tensor) -> torch.Tensor:
    """exp(p_1 - p_2 - 1), in [1/e, 1] as the published gate is: ours, an alternative to it."""
    return torch.exp(margin - 1)


def confidence_gate(teacher_logits: torch.Tensor, signal: GateSignal = "entropy") -> torch.Tensor:
    """The gate of raw teacher logits (N, V) at T = 1 (eq. 1-2, or ``gate_of_margin``); (N,), no gradient."""
    logits = teacher_logits.detach()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if signal == "margin":
        return gate_of_margin(margin_rows(logits))
    return gate_of_entropy(entropy_rows(logits), logits.shape[-1])


def token_divergences(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(TCKD, NCKD, 1 - q_k), each (N,), for logits (N, V) and valid targets (N,)."""
    index = targets.unsqueeze(1)
    student = student_logits / temperature
    teacher = teacher_logits.detach() / temperature
    student_rest = student.scatter(1, index, -torch.inf)
    teacher_rest = teacher.scatter(1, index, -torch.inf)
    a, b = student_rest.logsumexp(dim=1), teacher_rest.logsumexp(dim=1)
    u_student = student.gather(1, index).squeeze(1) - a
    u_teacher = teacher.gather(1, index).squeeze(1) - b
    rest_probs = torch.exp(teacher_rest - b.unsqueeze(1))  # 0 at the target
    nckd = (rest_probs * (teacher - student)).sum(dim=1) - b + a
    return binary_kl(u_teacher, u_student), nckd, torch.sigmoid(-u_teacher)


def gated_decoupled_kd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
    ignore_index: int = -100,
    normalizer: torch.Tensor | float | None = None,
    gate: torch.Tensor | None = None,
    decoupled: bool = True,
    vocabulary: VocabularyPolicy = "equal",
) -> DistillationTerms:
    """Gated decoupled distillation over aligned logits (no shift inside).

    Args:
        student_logits: (N, V), any floating dtype. teacher_logits: (N, V); no gradient.
        targets: (N,) int64 next tokens; ``ignore_index`` rows have no part in anything.
        temperature: T > 0.
        tckd_weight, nckd_weight: a and b of eq. 3.
        normalizer: what the sum is divided by; None means this call's sum of the gate. Pass the sum over all
            micro-batches and ranks for a loss that does not depend on how a step is cut.
        gate: (N,) precomputed gate (teacher-first pass, or ones for ungated); None computes it.
        decoupled: False replaces a TCKD + b NCKD by KL(q || p) = TCKD + (1 - q_k) NCKD.
        vocabulary: see ``VocabularyPolicy``; a target outside the common words is a ``ConfigError``.

    Returns:
        ``DistillationTerms``; the loss is 0 (with a zero gradient) when nothing is supervised.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}; expected a number above 0")
    student_logits, teacher_logits = align_vocabularies(student_logits, teacher_logits, vocabulary)
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    rows = (targets != ignore_index).nonzero().squeeze(1)
    kept = targets[rows]
    if kept.numel() and int(kept.max()) >= student_logits.shape[1]:
        raise ConfigError(
            f"target id {int(kept.max())} is not among the {student_logits.shape[1]} words "
            "that student and teacher share; their tokenizers differ"
        )
    student, teacher = student_logits[rows].to(dtype), teacher_logits[rows].detach().to(dtype)
    tckd, nckd, rest = token_divergences(student, teacher, kept, temperature)
    kept_gate = confidence_gate(teacher) if gate is None else gate[rows].detach().to(dtype)
    per_token = tckd_weight * tckd + nckd_weight * nckd if decoupled else tckd + rest * nckd
    gate_sum = kept_gate.sum()
    divisor = gate_sum.clamp_min(1e-8) if normalizer is None else normalizer
    loss = temperature**2 * (kept_gate * per_token).sum() / divisor

    def at_rows(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(targets.shape[0]).index_copy(0, rows, values)

    return DistillationTerms(loss, at_rows(tckd), at_rows(nckd), at_rows(kept_gate), gate_sum)
