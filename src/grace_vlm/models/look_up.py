"""Embeddings of tokens, whose gradient goes to the rows that were looked up and nowhere else.

Autograd makes a gradient of the whole table: 0.6 GB for 151,936 words of 2,048 numbers in BF16, of which a micro-batch
touches some hundred rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SUM = "grace_gradient_sum"
"""Attribute of a table: (words, d), where its gradients are added up."""


def sum_look_ups(model: Any, accumulator: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Let the gradients of a model's table of words be added to ``accumulator(table)``, a tensor of its shape; a table
    that is not trained has none (None)."""
    table = model.model.language_model.embed_tokens
    total = accumulator(table.weight)
    if total is not None:
        setattr(table, _SUM, total)


def look_up(table: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """(..., d) rows of the table for (...) int64 ids, in its dtype."""
    total = getattr(table, _SUM, None)
    found: torch.Tensor
    if total is None or not torch.is_grad_enabled():
        found = table(ids)
    else:
        found = _LookUp.apply(table.weight, ids, total, table.padding_idx)
    return found


class _LookUp(torch.autograd.Function):
    """(table, ids) -> rows. The table's gradient is added to ``total`` and not returned."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, total: torch.Tensor, padding: int | None) -> Any:
        ctx.ids, ctx.total, ctx.padding = ids, total, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        ids, added = ctx.ids.flatten(), gradient.flatten(0, -2).to(ctx.total.dtype)
        if ctx.padding is not None:
            added = added.masked_fill((ids == ctx.padding).unsqueeze(1), 0.0)
        if ids.is_cuda:  # sorted, so that sums are the same every time; index_add_ is that on a CPU
            ctx.total.index_put_((ids,), added, accumulate=True)
        else:
            ctx.total.index_add_(0, ids, added)
        return None, None, None, None
