"""Relational alignment: do student and teacher agree which image regions belong together? (GRACE eq. 10-13)

For one image, X (n, d_s) and Y (n, d_t) are the hidden states of its n visual tokens at the tapped layer. Rows are
l2-normalised, K = X X^T holds the cosines, H = I - 1/n centres, and

    HSIC(K, L) = <H K H, H L H>,   CKA = HSIC(K_T, K_S) / sqrt(HSIC(K_T, K_T) HSIC(K_S, K_S)),   loss = 1 - CKA

Only the n x n relations are compared, so widths may differ and no projector is learned. FP64 stays FP64, else FP32.
Images under ``min_tokens`` tokens, or whose centred Gram vanishes (squared norm < 1e-8), have no part in it, as in
the official code; unlike there, the test is a mask and not a host synchronisation per image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

DEGENERATE_SQUARED_NORM = 1e-8


def _centred_gram(features: torch.Tensor) -> torch.Tensor:
    """H X^ X^^T H of a stack of images (k, n, d) -> (k, n, n)."""
    rows = F.normalize(features, dim=-1)
    rows = rows - rows.mean(dim=1, keepdim=True)  # centring the rows centres the Gram matrix on both sides
    return rows @ rows.transpose(1, 2)


def relational_cka_sum(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    image_lengths: Sequence[int] | torch.Tensor,
    *,
    min_tokens: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of 1 - CKA, number of images that entered), both scalars.

    Args:
        student_features: (n, d_s), all visual tokens, image after image. teacher_features: (n, d_t); no gradient.
        image_lengths: visual tokens of each image, a list or 1-D tensor; their sum is n.
        min_tokens: an image with fewer tokens is left out.
    """
    lengths = [int(length) for length in image_lengths]
    if sum(lengths) != student_features.shape[0] or sum(lengths) != teacher_features.shape[0]:
        raise ValueError(
            f"image_lengths add up to {sum(lengths)}, features have "
            f"{student_features.shape[0]} (student) and {teacher_features.shape[0]} (teacher) rows"
        )
    dtype = torch.float64 if student_features.dtype == torch.float64 else torch.float32
    student, teacher = student_features.to(dtype), teacher_features.detach().to(dtype)
    # The sum of no elements keeps a graph, so that backward works when no image enters.
    total, count = student[:0].sum(), torch.zeros((), dtype=dtype, device=student.device)
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    for length in sorted(set(lengths)):
        if length < min_tokens:
            continue
        # Images of one length are one batched product.
        first = torch.tensor([s for s, n in zip(starts, lengths, strict=True) if n == length], device=student.device)
        index = first.unsqueeze(1) + torch.arange(length, device=student.device)
        gram_s, gram_t = _centred_gram(student[index]), _centred_gram(teacher[index])
        norm_s, norm_t = gram_s.square().sum((1, 2)), gram_t.square().sum((1, 2))
        enters = (norm_s >= DEGENERATE_SQUARED_NORM) & (norm_t >= DEGENERATE_SQUARED_NORM)
        norms = torch.where(enters, norm_s, 1.0).sqrt() * torch.where(enters, norm_t, 1.0).sqrt()
        cka = (gram_s * gram_t).sum((1, 2)) / norms
        total = total + torch.where(enters, 1.0 - cka, 0.0).sum()
        count = count + enters.sum()
    return total, count


def relational_cka(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    image_lengths: Sequence[int] | torch.Tensor,
    *,
    min_tokens: int = 4,
    normalizer: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean of 1 - CKA over the images that enter (eq. 13), a scalar; 0 when none does.

    ``normalizer``: divide the sum by this instead (images of all micro-batches and ranks). Other arguments as in
    ``relational_cka_sum``.
    """
    total, count = relational_cka_sum(student_features, teacher_features, image_lengths, min_tokens=min_tokens)
    return total / (count.clamp_min(1.0) if normalizer is None else normalizer)
