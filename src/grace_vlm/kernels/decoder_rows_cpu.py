"""``decoder_rows`` and ``paged_attention`` on a CPU (decoder_cpu.c)."""

from __future__ import annotations

import torch

from grace_vlm.kernels.cpu import address, library, num_threads, runs_c
from grace_vlm.kernels.heads import Heads

WIDTH = 16
"""Rows are of a multiple of so many numbers."""
MOST_NUMBERS = 4096
"""Of the query heads that share a key head."""


def takes_gates(x: torch.Tensor) -> bool:
    return x.ndim == 2 and x.shape[1] % (2 * WIDTH) == 0 and runs_c(x)


def takes_heads(qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: Heads) -> bool:
    numbers = heads.num_heads // heads.num_kv_heads * heads.head_dim
    return heads.head_dim % WIDTH == 0 and numbers <= MOST_NUMBERS and runs_c(qkv, keys, values)


def gated(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty(len(x), x.shape[1] // 2, dtype=torch.float32)
    library().gated_rows(address(x), address(y), *y.shape, num_threads())
    return y


def rotate_append(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Heads,
) -> torch.Tensor:
    queries = torch.empty(len(qkv), heads.num_heads, heads.head_dim, dtype=torch.float32)
    # Named, so that copies live while their addresses are used.
    given = [qkv, *rotation, heads.query_norm, heads.key_norm, slots]
    kept = [None if part is None else part.contiguous() for part in given]
    library().rotate_append_rows(
        *map(address, (*kept, keys, values, queries)),
        len(qkv),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        heads.epsilon,
        num_threads(),
    )
    return queries


def new_slots(table: torch.Tensor, lengths: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """(B,) int64: where each request's next token goes; ``table`` and ``lengths`` as ``paged_attention`` has them."""
    page = table.gather(1, (lengths // page_tokens).long().unsqueeze(1)).squeeze(1).long()
    return page * page_tokens + lengths % page_tokens


def paged_attention(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    heads: Heads,
    page_tokens: int,
) -> torch.Tensor:
    queries = rotate_append(qkv, rotation, new_slots(table, lengths, page_tokens), keys, values, heads)
    out = torch.empty(len(qkv), heads.num_heads * heads.head_dim, dtype=torch.float32)
    kept = (queries, keys, values, table.contiguous(), lengths.contiguous(), out)
    library().attend_pages(
        *map(address, kept),
        len(qkv),
        table.shape[1],
        page_tokens,
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        num_threads(),
    )
    return out
