"""Distributions over the vocabulary from hidden states, a stretch of rows at a time: (N, V) is never whole.

All sums in FP32 from FP32 logits, whatever the states' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from grace_vlm.losses.gdkd import entropy_of

_STRETCH_ELEMENTS = 1 << 24
"""Logits that exist at one time, of one model: 64 MB."""


def stretches(num_rows: int, num_words: int) -> Iterator[slice]:
    """Rows in parts whose logits are few enough."""
    step = max(1, _STRETCH_ELEMENTS // num_words)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def log_probs_of(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(n, V) FP32 log-probabilities at T = 1 of states (n, d) under a head (V, d)."""
    return F.log_softmax((hidden @ head.T).float(), dim=-1)


@torch.no_grad()
def entropy_and_error(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(entropy in nats (n,) FP32, whether the likeliest word is not the target (n,) bool).

    Args:
        hidden: (n, d). head: (V, d). targets: (n,) int64 words.
    """
    entropy = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    wrong = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows in stretches(len(hidden), len(head)):
        log_probs = log_probs_of(hidden[rows], head)
        entropy[rows] = entropy_of(log_probs)
        wrong[rows] = log_probs.argmax(dim=-1) != targets[rows]
    return entropy, wrong


@torch.no_grad()
def divergence(
    hidden_p: torch.Tensor, head_p: torch.Tensor, hidden_q: torch.Tensor, head_q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(p || q) in nats (n,) FP32, whether their likeliest words differ (n,) bool), row by row at T = 1.

    Args:
        hidden_p, hidden_q: (n, d_p), (n, d_q). head_p, head_q: (V, d_p), (V, d_q): the same words.
    """
    kl = torch.empty(len(hidden_p), dtype=torch.float32, device=hidden_p.device)
    differs = torch.empty(len(hidden_p), dtype=torch.bool, device=hidden_p.device)
    for rows in stretches(len(hidden_p), len(head_p)):
        log_p, log_q = log_probs_of(hidden_p[rows], head_p), log_probs_of(hidden_q[rows], head_q)
        kl[rows] = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
        differs[rows] = log_p.argmax(dim=-1) != log_q.argmax(dim=-1)
    return kl, differs
