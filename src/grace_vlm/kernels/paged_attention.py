"""Attention of one new token a request over keys and values that lie in pages; its own are appended on the way.

    qkv (B, (H + 2 KV) D) --norm of q and k, rotation--> q (B, H, D), k --append--> cache
    out_h = sum_t softmax_t(q_h . k_t / sqrt(D)) v_t        t over the request's tokens and the new one

Here are the call and the reference; ``paged_attention_triton.py`` does it on a GPU. On a CPU contexts of similar length
are filled up to the longest and attended in one call: a call for each is a good part of a small model's step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from grace_vlm.kernels import runs_triton
from grace_vlm.kernels.cache_rows import read_rows
from grace_vlm.kernels.decoder_rows import rotate_append_reference
from grace_vlm.kernels.heads import BLOCK, Heads

MOST_FILLED = 2
"""Times the tokens of all contexts that may be read where they are filled up to the longest."""


def splits_for(num_requests: int, num_kv_heads: int, num_processors: int, most_tokens: int) -> int:
    """How many shares a context is read in, a power of two: enough programs for the GPU, no share without a block."""
    wanted = 2 * num_processors / (num_requests * num_kv_heads)
    return 1 << max(0, min(math.ceil(math.log2(max(wanted, 1))), int(math.log2(max(1, most_tokens // BLOCK))), 5))


def paged_attention(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    heads: Heads,
    page_tokens: int,
    splits: int = 1,
    alone: bool = False,
) -> torch.Tensor:
    """(B, H D) attention of B new tokens; their keys and values are in the cache after.

    Args:
        qkv: (B, (H + 2 KV) D). rotation: cos and sin, (B, D) each.
        keys, values: (slots, KV, D), a layer's cache, in the dtype of qkv or E4M3 (``cache_rows``).
        table: (B, pages) int32, the requests' pages in order.
        lengths: (B,) int32, tokens that a request has there already; the new one goes behind them.
        splits: shares of the context, a power of two, where Triton runs.
        alone: elsewhere, every request by itself, so that its sums do not depend on others.
    """
    if not runs_triton(qkv):
        run = paged_attention_reference if alone or not _are_alike(lengths) else paged_attention_filled
        return run(qkv, rotation, keys, values, table, lengths, heads, page_tokens)
    from grace_vlm.kernels.paged_attention_triton import decode

    return decode(qkv, rotation, keys, values, table, lengths, heads, page_tokens, splits)


def _are_alike(lengths: torch.Tensor) -> bool:
    """Whether several contexts, filled up to the longest, are not much more than they are."""
    count = len(lengths)
    return count > 1 and count * (int(lengths.max()) + 1) <= MOST_FILLED * (int(lengths.sum()) + count)


def paged_attention_reference(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    heads: Heads,
    page_tokens: int,
) -> torch.Tensor:
    """The same in torch, request by request."""
    contexts = []
    for line, length in zip(table.long(), lengths.tolist(), strict=True):
        token = torch.arange(length + 1, device=qkv.device)
        contexts.append(line[token // page_tokens] * page_tokens + token % page_tokens)
    slots = torch.stack([context[-1] for context in contexts])
    query = rotate_append_reference(qkv, rotation, slots, keys, values, heads)
    out = []
    for own, context in zip(query, contexts, strict=True):
        there = [read_rows(cache, context, qkv.dtype) for cache in (keys, values)]
        out.append(attend(own[None, None], *(part[None] for part in there)))
    return torch.cat(out).flatten(1)


def paged_attention_filled(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    heads: Heads,
    page_tokens: int,
) -> torch.Tensor:
    """The same for all requests at once. A shorter context is filled up with its last token, behind a mask: what lies
    in pages that are not a request's may be no number."""
    place = torch.arange(int(lengths.max()) + 1, device=qkv.device)
    last = lengths.long().unsqueeze(1)
    token = place.minimum(last)
    context = table.long().gather(1, token // page_tokens) * page_tokens + token % page_tokens
    query = rotate_append_reference(qkv, rotation, context[:, -1], keys, values, heads)
    k, v = (
        read_rows(kept, context.flatten(), qkv.dtype).view(*context.shape, *kept.shape[1:]) for kept in (keys, values)
    )
    return attend(query.unsqueeze(1), k, v, (place <= last)[:, None, None]).flatten(1)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(b, n, heads, d): causal attention of the last n tokens of b contexts (b, L, kv_heads, d), n <= L.

    Args:
        mask: instead of the causal one, where something is to be seen; (b, 1, n, L).
    """
    count, length = query.shape[1], keys.shape[1]
    if mask is None and 1 < count < length:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
    q, k, v = (t.transpose(1, 2) for t in (query, keys, values))
    grouped = query.shape[2] != keys.shape[2]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < count == length, enable_gqa=grouped)
    return out.transpose(1, 2)
