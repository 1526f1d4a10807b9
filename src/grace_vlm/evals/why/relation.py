"""Do student and teacher agree which regions of a picture belong together, layer by layer? (GRACE eq. 10-12)

The CKA of the relation loss (losses/rcka.py), for every state of the student against every state of the teacher:

    x^ = x / |x| row by row,   K = (H x^)(H x^)^T,   CKA(K, L) = <K, L> / (|K| |L|)          of one picture
    entry (i, j): mean over the pictures that enter, of state i of the student and j of the teacher

Pictures under four visual tokens have no part, nor has a pair of states whose centred Gram vanishes, as in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from grace_vlm.losses.rcka import DEGENERATE_SQUARED_NORM

MIN_TOKENS = 4


@torch.no_grad()
def cka_matrix(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> torch.Tensor:
    """(len(ours), len(theirs)) FP32 CKA of one picture (FP64 of FP64 states); NaN where a Gram vanishes.

    Args:
        ours, theirs: states (n, d) of the picture's n visual tokens; widths may differ from state to state.
    """
    own, other = (torch.stack([_gram(state) for state in states]) for states in (ours, theirs))
    return own @ other.T


def _gram(state: torch.Tensor) -> torch.Tensor:
    """(n * n,) centred cosines of a state (n, d), of length 1; NaN where there is nothing to normalise."""
    unit = F.normalize(state if state.dtype == torch.float64 else state.float(), dim=-1)
    centred = unit - unit.mean(dim=0, keepdim=True)
    gram = (centred @ centred.T).flatten()
    squared = gram.square().sum()
    return gram / torch.where(squared < DEGENERATE_SQUARED_NORM, torch.nan, squared.sqrt())


class Relation:
    """The mean of the matrices over pictures, as they come."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._count: torch.Tensor | None = None
        self.num_pictures = 0

    def add(self, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], image_lengths: Sequence[int]) -> None:
        """
        Args:
            ours, theirs: states (n_visual, d) of a batch, picture after picture. image_lengths: tokens of each.
        """
        start = 0
        for length in image_lengths:
            own, start = slice(start, start + length), start + length
            if length < MIN_TOKENS:
                continue
            found = cka_matrix([state[own] for state in ours], [state[own] for state in theirs]).double().cpu()
            known = ~found.isnan()
            zero = torch.zeros_like(found)
            self._total = torch.where(known, found, zero) + (zero if self._total is None else self._total)
            self._count = known.double() + (zero if self._count is None else self._count)
            self.num_pictures += 1

    def summary(self) -> dict[str, Any]:
        """``matrix`` (None where no picture entered), ``matched`` and ``tapped`` (what the loss sees)."""
        if self._total is None or self._count is None:
            return {"num_pictures": 0, "matrix": [], "matched": [], "tapped": None}
        mean = self._total / self._count
        matrix = [[None if value != value else value for value in row] for row in mean.tolist()]
        last = mean.shape[1] - 1
        pairs = matched_states(*mean.shape)
        matched = [{"student": i, "teacher": j, "cka": matrix[i][j]} for i, j in pairs]
        return {
            "num_pictures": self.num_pictures,
            "matrix": matrix,
            "matched": matched,
            "tapped": matrix[-2][last - 1] if len(matrix) > 1 and last else None,
        }


def matched_states(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """(state of the student, the teacher's state at the same share of the depth), from the embeddings to the end."""
    ratio = (num_teacher - 1) / max(1, num_student - 1)
    return [(i, round(i * ratio)) for i in range(num_student)]
