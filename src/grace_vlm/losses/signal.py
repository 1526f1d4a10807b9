"""What a teacher says about a batch: the one record between teacher and loss.

An online teacher, an FP8 teacher, a teacher on another GPU and a disk cache all produce it; the loss never knows
which. It is made in the teacher-first pass over all micro-batches of an optimizer step, so that the normalisers
(sum of the gate, number of tokens, number of images) are known before the first student forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TeacherSignal:
    """The teacher's view of one micro-batch.

    Args:
        hidden: (n_supervised, d_t) last hidden states (after the final norm) at supervised positions; the teacher's
            head turns them into logits where the loss needs them. 8 KB a token where logits would be 300 KB.
        gate: (n_supervised,) FP32 confidence gate (GRACE eq. 2).
        relational: (n_visual, d_t) hidden states of the visual tokens at the tapped layer, image after image.
        image_lengths: visual tokens of each image; their sum is n_visual.
    """

    hidden: torch.Tensor
    gate: torch.Tensor
    relational: torch.Tensor
    image_lengths: tuple[int, ...]
