"""What follows the head of a decode step: the likeliest token is the next input, and every row is one further on."""

from __future__ import annotations

import torch

from grace_vlm.kernels import runs_triton


def advance(logits: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> None:
    """ids become the argmax of (n, V) logits, the first of equals; positions and lengths grow by one. Of logits that
    are not numbers a GPU takes none, torch the first: such a model says nothing either way.

    Args:
        ids, positions: (n,) int64. lengths: (n,) int32. All are changed.
    """
    if runs_triton(logits):
        from grace_vlm.kernels.next_token_triton import advance as fused

        fused(logits, ids, positions, lengths)
        return
    ids.copy_(logits.argmax(dim=-1))
    positions += 1
    lengths += 1
