"""What a teacher says about a batch: the one record between teacher and loss.

An online teacher, an FP8 teacher, a teacher on another GPU and a disk cache all produce it; the loss never knows
which. It is made in the teacher-first pass over all micro-batches of an optimizer step, so that the normalisers
(sum of the gate, number of tokens, number of images) are known before the first student forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def triangle(tokens: int) -> int:
    """Values of the lower triangle of a (tokens, tokens) matrix, its diagonal included."""
    return tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class Grams:
    """The centred Gram matrix K_T of each image: all that the relation loss needs of a teacher (losses/rcka.py).

    Args:
        values: (sum of n (n + 1) / 2,) FP32 (FP64 from FP64 features), the lower triangle of each image's (n, n)
            matrix, row after row, image after image. Half the bytes of the matrix on disk and on the bus; and where
            (i, j) stands in a triangle does not depend on n, so images of any length are unpacked with one table.
    """

    values: torch.Tensor


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's view of one micro-batch.

    Args:
        hidden: (n_supervised, d_t) last hidden states (after the final norm) at supervised positions; the teacher's
            head turns them into logits where the loss needs them. 8 KB a token where logits would be 300 KB.
        gate: (n_supervised,) FP32 confidence gate (GRACE eq. 2).
        relational: (n_visual, d_t) hidden states of the visual tokens at the tapped layer, image after image; or what
            the loss would make of them, ``Grams``, where features would be 21 times the bytes (196 tokens, 4,096 wide).
        image_lengths: visual tokens of each image; their sum is n_visual.
    """

    hidden: torch.Tensor
    gate: torch.Tensor
    relational: torch.Tensor | Grams
    image_lengths: tuple[int, ...]
