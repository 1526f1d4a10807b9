"""Attention of one new token a request over keys and values that lie in pages; its own are appended on the way.

    qkv (B, (H + 2 KV) D) --norm of q and k, rotation--> q (B, H, D), k --append--> cache
    out_h = sum_t softmax_t(q_h . k_t / sqrt(D)) v_t        t over the request's tokens and the new one

Here are the call and the reference; ``paged_attention_triton.py`` does it on a GPU.
"""

from __future__ import annotations

import math

import torch

from grace_vlm.kernels import runs_triton
from grace_vlm.kernels.heads import BLOCK, Heads


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
) -> torch.Tensor:
    """(B, H D) attention of B new tokens; their keys and values are in the cache after.

    Args:
        qkv: (B, (H + 2 KV) D). rotation: cos and sin, (B, D) each.
        keys, values: (slots, KV, D), a layer's cache. table: (B, pages) int32, the requests' pages in order.
        lengths: (B,) int32, tokens that a request has there already; the new one goes behind them.
        splits: shares of the context, a power of two.
    """
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
    h, kv, d = heads.num_heads, heads.num_kv_heads, heads.head_dim
    query, key, value = qkv.view(len(qkv), h + 2 * kv, d).split([h, kv, kv], dim=1)
    if heads.query_norm is not None and heads.key_norm is not None:
        query, key = _rms(query, heads.query_norm, heads.epsilon), _rms(key, heads.key_norm, heads.epsilon)
    cos, sin = (part.unsqueeze(1) for part in rotation)
    query, key = (x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1) * sin for x in (query, key))
    out = []
    for number, length in enumerate(lengths.tolist()):
        token = torch.arange(length + 1, device=qkv.device)
        slots = table[number, token // page_tokens].long() * page_tokens + token % page_tokens
        keys[slots[-1]], values[slots[-1]] = key[number], value[number]
        own = torch.nn.functional.scaled_dot_product_attention(
            query[number].view(1, h, 1, d), keys[slots].transpose(0, 1)[None], values[slots].transpose(0, 1)[None],
            enable_gqa=h != kv,
        )  # fmt: skip
        out.append(own.reshape(h * d))
    return torch.stack(out)


def _rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
