"""Sizes of a decoder's attention, as its kernels are told of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64
"""Tokens of the context that a kernel reads at a time."""


@dataclass(frozen=True)
class Heads:
    """Of attention: query heads, key heads, numbers of a head; weights (D,) of the norms of q and k, or None."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0
