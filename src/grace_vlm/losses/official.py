"""The official implementation's arithmetic, for parity: what a run of theirs computes, with its roundings.

Logits are rounded to BF16, as its vocabulary heads return them, and then taken in FP32. With p = softmax(z / T):

    TCKD    of the pairs (p_k, 1 - p_k), 1 - p formed in FP32 and every entry clamped at 1e-8: for a confident teacher
            the clamp is the divergence, and its gradient is 0
    NCKD    of softmax(z / T) with logit k at the smallest FP32 number, term k set to 0
    gate    exp(-H / log|V|), H from probabilities clamped at 1e-12 inside the logarithm

BF16 logits perturb the gradient of the divergences by 4 to 8 %, the clamp loses that of the target for teachers with
1 - p < 1e-8. ``losses/gdkd.py`` and ``losses/linear_gdkd.py`` have neither; use this (``loss.implementation=official``
with ``loss.normalization=microbatch``) to reproduce a curve, not to train better. ``benchmarks/official_loss.py``
restates the official code apart, and a test compares the two.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SMALLEST_PROBABILITY = 1e-8
SMALLEST_IN_LOGARITHM = 1e-12


def official_logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(N, d) states through a head (V, d): (N, V) BF16. Each term takes them in FP32 by itself, so that the gradients
    of the terms are rounded to BF16 one by one, as there."""
    return F.linear(hidden, head).to(torch.bfloat16)


def official_gate(teacher_logits: torch.Tensor) -> torch.Tensor:
    """(N, V) -> (N,) FP32 gate, no gradient."""
    probs = torch.softmax(teacher_logits.detach().float(), dim=-1)
    entropy = -(probs * probs.clamp_min(SMALLEST_IN_LOGARITHM).log()).sum(dim=-1)
    return torch.exp(-entropy / math.log(teacher_logits.shape[-1]))


def official_decoupled_kd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
) -> torch.Tensor:
    """T^2 (a TCKD + b NCKD) of each token: (N, V) logits, (N,) valid targets -> (N,) FP32."""
    index = targets.unsqueeze(1)
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature

    def pair(logits: torch.Tensor) -> torch.Tensor:
        p_k = torch.softmax(logits, dim=-1).gather(1, index)
        return torch.cat([p_k, 1.0 - p_k], dim=1).clamp_min(SMALLEST_PROBABILITY)

    p, q = pair(student), pair(teacher)
    tckd = (q * (q.log() - p.log())).sum(dim=1)

    def rest(logits: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(logits.scatter(1, index, torch.finfo(logits.dtype).min), dim=-1)

    log_p, log_q = rest(student), rest(teacher)
    nckd = (log_q.exp() * (log_q - log_p)).scatter(1, index, 0.0).sum(dim=1)
    return temperature**2 * (tckd_weight * tckd + nckd_weight * nckd)
