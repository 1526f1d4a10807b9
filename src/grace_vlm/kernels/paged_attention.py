"""Attention of one new token a request over keys and values that lie in pages; its own are appended on the way.

    qkv (B, (H + 2 KV) D) --norm of q and k, rotation--> q (B, H, D), k --append--> cache
    out_h = sum_t softmax_t(q_h . k_t / sqrt(D)) v_t        t over the request's tokens and the new one

Here are the call and the reference; ``paged_attention_triton.py`` does it on a GPU,
``decoder_rows_cpu.py`` on a CPU in FP32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from grace_vlm.kernels import decoder_rows_cpu, runs_triton
from grace_vlm.kernels.cache_rows import read_rows
from grace_vlm.kernels.decoder_rows import rotate_append_reference
from grace_vlm.kernels.heads import BLOCK, Heads


def splits_for(num_requests: int, num_kv_heads: int, num_processors: int, most_tokens: int) -> int:
    """How many shares a context is read in, a power of two: enough programs for the GPU, no share without a block. Two
    at least, so that the last programs of a launch are short ones, until there are very many."""
    programs = num_requests * num_kv_heads
    wanted = round(math.log2(max(1.0, 2 * num_processors / programs)))
    least = 1 if programs < 8 * num_processors else 0
    return 1 << min(max(wanted, least), int(math.log2(max(1, most_tokens // BLOCK))), 5)


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
) -> torch.Tensor:
    """(B, H D) attention of B new tokens; their keys and values are in the cache after.

    Args:
        qkv: (B, (H + 2 KV) D). rotation: cos and sin, (B, D) each.
        keys, values: (slots, KV, D), a layer's cache, in the dtype of qkv or E4M3 (``cache_rows``).
        table: (B, pages) int32, the requests' pages in order.
        lengths: (B,) int32, tokens that a request has there already; the new one goes behind them.
        splits: shares of the context, a power of two.
    """
    if decoder_rows_cpu.takes_heads(qkv, keys, values, heads):
        return decoder_rows_cpu.paged_attention(qkv, rotation, keys, values, table, lengths, heads, page_tokens)
    if not runs_triton(qkv):
        return paged_attention_reference(qkv, rotation, keys, values, table, lengths, heads, page_tokens)
    from grace_vlm.kernels.paged_attention_triton import decode

    return decode(qkv, rotation, keys, values, table, lengths, heads, page_tokens, splits)


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


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(b, n, heads, d): causal attention of the last n tokens of b contexts (b, L, kv_heads, d), n <= L."""
    count, length = query.shape[1], keys.shape[1]
    mask = None
    if 1 < count < length:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
    q, k, v = (t.transpose(1, 2) for t in (query, keys, values))
    grouped = query.shape[2] != keys.shape[2]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < count == length, enable_gqa=grouped)
    return out.transpose(1, 2)
