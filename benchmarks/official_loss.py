"""The cross-entropy and the gated distillation as the official GRACE code forms them: the peer of bench_loss.py.

Written anew from a description of that code, not from its text. For N supervised tokens with targets k:

    logits    of both models, (N, V) BF16, whole; the student's under autograd, the teacher's without
    CE        mean cross-entropy of logits.float()
    TCKD      p = softmax(z / T)_k; the entries p and 1 - p, formed in FP32 and clamped at 1e-8; KL of the two pairs
    NCKD      the logit of k becomes finfo.min, log-softmax again for both; KL without its term at k
    gate      exp(-H / log V), H = entropy of softmax(y) at T = 1, probabilities clamped at 1e-12 inside the logarithm
    GDKD      sum gate T^2 (a TCKD + b NCKD) / clamp(sum gate, 1e-8);    total = CE + weight GDKD

GDKD is formed in chunks of 2,048 rows, but under plain autograd: what one chunk needs for its backward (a softmax, a
log-softmax and the teacher's probabilities, 12 bytes a logit) stays until the backward of all of them. The chunks bound
the temporaries and nothing else. ``tests/benchmarks/test_official_loss.py`` holds this to an FP64 form written apart,
and shows what the clamps lose.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CHUNK_SIZE = 2048
"""``dkd_chunk_size`` of the official code, in rows."""
IGNORE_INDEX = -100
MIN_PROBABILITY, MIN_IN_LOG, MIN_GATE_SUM = 1e-8, 1e-12, 1e-8


def entropy_gate(teacher_logits: torch.Tensor) -> torch.Tensor:
    """exp(-H / log V) of raw FP32 logits (C, V): (C,), no gradient."""
    with torch.no_grad():
        probs = torch.softmax(teacher_logits, dim=-1)
        entropy = -(probs * torch.log(probs.clamp_min(MIN_IN_LOG))).sum(dim=-1)
        return torch.exp(-entropy / math.log(teacher_logits.shape[-1]))


def binary_divergence(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """TCKD (C,) of FP32 logits (C, V) that are divided by T already."""
    pairs = []
    for logits in (student, teacher):
        of_target = torch.softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        pairs.append(torch.stack([of_target, 1.0 - of_target], dim=-1).clamp_min(MIN_PROBABILITY))
    student_pair, teacher_pair = pairs
    return (teacher_pair * (teacher_pair.log() - student_pair.log())).sum(dim=-1)


def rest_divergence(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NCKD (C,) of FP32 logits (C, V) that are divided by T already."""
    index, lowest = targets.unsqueeze(1), torch.finfo(torch.float32).min
    student_log_probs = torch.log_softmax(student.scatter(1, index, lowest), dim=-1)
    teacher_log_probs = torch.log_softmax(teacher.scatter(1, index, lowest), dim=-1)
    terms = teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)
    return terms.scatter(1, index, 0.0).sum(dim=-1)


def official_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
    distillation_weight: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, cross-entropy, GDKD), scalars, for aligned logits: nothing is shifted and every row is supervised.

    Args:
        student_logits: (N, V), any floating dtype. teacher_logits: (N, V), no gradient.
        targets: (N,) int64 next tokens.
        chunk_size: rows of GDKD at a time; bounds temporaries, not what autograd keeps.
    """
    cross_entropy = F.cross_entropy(student_logits.float(), targets, ignore_index=IGNORE_INDEX)
    supervised = targets != IGNORE_INDEX
    student_rows, teacher_rows = student_logits[supervised], teacher_logits.detach()[supervised]
    targets = targets[supervised]
    weighted, gates = [], []
    for start in range(0, targets.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        raw_teacher = teacher_rows[rows].float()
        gate = entropy_gate(raw_teacher)
        student, teacher = student_rows[rows].float() / temperature, raw_teacher / temperature
        tckd = binary_divergence(student, teacher, targets[rows])
        nckd = rest_divergence(student, teacher, targets[rows])
        weighted.append((gate * (tckd_weight * tckd + nckd_weight * nckd)).sum() * temperature**2)
        gates.append(gate.sum())
    gdkd = torch.stack(weighted).sum() / torch.stack(gates).sum().clamp_min(MIN_GATE_SUM)
    return cross_entropy + distillation_weight * gdkd, cross_entropy, gdkd


def official_step(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, loss and backward.

    Args:
        student_hidden: (N, d_s). student_head: (V, d_s). teacher_hidden: (N, d_t). teacher_head: (V, d_t).
        targets: (N,) int64.

    Returns:
        (total, d total / d student_hidden, d total / d student_head), the gradients in the dtype of what they are of.
    """
    hidden, head = student_hidden.detach().requires_grad_(), student_head.detach().requires_grad_()
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_head.T
    student_logits = hidden @ head.T
    total, _, _ = official_loss(student_logits, teacher_logits, targets)
    total.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return total.detach(), hidden.grad, head.grad
