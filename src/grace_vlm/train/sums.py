"""Where gradients of leaves are added up over the micro-batches of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GradientSum:
    """dL/dleaf over the micro-batches of a step. Holds no leaf: a tensor whose hook holds it is never freed.

    While ``is_empty`` its values are those of the step before and the first gradient replaces them: filling 5.6 GB of
    zeros and reading them again would take 4 ms of a step of Qwen3-VL-2B.
    """

    total: torch.Tensor
    """Of the whole leaf, or of this process's rows where a layer's gradients are shared out (``shards.py``)."""
    is_empty: bool = True
    is_shared: bool = False
    """Others add to ``total`` too, so it is zeros when it is empty."""

    def clear(self) -> None:
        self.is_empty = not self.is_shared
        if self.is_shared:
            self.total.zero_()

    def add(self, gradient: torch.Tensor) -> None:
        if self.is_empty:
            self.total.copy_(gradient)
        else:
            self.total.add_(gradient)
        self.is_empty = False

    def settled(self) -> torch.Tensor:
        """The sum, 0 if nothing came."""
        if self.is_empty:
            self.total.zero_()
        self.is_empty = False
        return self.total


class LeafSums:
    """The gradient sums of some leaves, for whoever makes gradients without autograd's hooks (``models.graphs``)."""

    def __init__(self, sums: dict[nn.Parameter, GradientSum]) -> None:
        self._sums = sums

    def are_empty(self) -> bool:
        """Whether nothing was added since the step began; of some of them only is an error. Of no leaves: False."""
        empty = {total.is_empty for total in self._sums.values()} or {False}
        assert len(empty) == 1, "some leaves have a gradient of this micro-batch and some have not"
        return empty.pop()

    def add(self, leaf: nn.Parameter, gradient: torch.Tensor) -> None:
        self._sums[leaf].add(gradient)

    def mark_filled(self) -> None:
        """Something has been added behind our back."""
        for total in self._sums.values():
            total.is_empty = False
