"""One forward of the decoder over tokens of many requests that lie end to end.

    x    (n, d)   embeddings, visual tokens' rows replaced by their pictures'
    layer         x += attention(norm(x));  x += mlp(norm(x));  DeepStack rows are added after the first layers
    out  (r, d)   after the last norm, of the rows that are wanted

A request's rows are a ``Span``: they follow tokens that are in the cache already. A prompt in pieces, a whole prompt
and a single new token are the same to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from grace_vlm.engine.cache import KeyValueCache
from grace_vlm.engine.layers import Layer, Weights, normalized
from grace_vlm.kernels import runs_triton
from grace_vlm.kernels.heads import Heads
from grace_vlm.kernels.low_bit_linear import Norm
from grace_vlm.models.decoder import attend_contexts


@dataclass(frozen=True)
class Span:
    """Rows of one request: so many of them, and the tokens that it has with them."""

    count: int
    length: int


@dataclass(frozen=True)
class Step:
    """What one forward is given.

    Args:
        embeds: (n, d). positions: (3, n) int64. slots: (n,) int64, where the rows' keys and values go.
        spans: their counts sum to n. context: (sum of lengths,) int64, where all tokens of the spans lie in the cache.
        borders: of rows and of contexts, where one kernel attends for all spans; None: it is done span by span.
        visual: (v,) int64 rows of visual tokens. deepstack: (v, d) each, added to those rows after the first layers.
        wanted: (r,) int64 rows that are returned.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    spans: Sequence[Span]
    context: torch.Tensor
    borders: tuple[torch.Tensor, torch.Tensor] | None
    visual: torch.Tensor
    deepstack: Sequence[torch.Tensor]
    wanted: torch.Tensor


@torch.inference_mode()
def forward(weights: Weights, cache: KeyValueCache, step: Step) -> torch.Tensor:
    """(r, d) states that the head reads; the rows' keys and values are in the cache after."""
    x = step.embeds
    rotation = weights.rotary(x, step.positions)
    for number, layer in enumerate(weights.layers):
        attended = _attention(weights, cache, number, layer, x, rotation, step)
        x = layer.attention_out(attended, residual=x)
        x = layer.down(layer.gate_up(x, norm=layer.mlp_norm), residual=x)
        if number < len(step.deepstack):
            x = x.index_add(0, step.visual, step.deepstack[number].to(x.dtype))
    return normalized(x.index_select(0, step.wanted), weights.last_norm)


def _attention(
    weights: Weights,
    cache: KeyValueCache,
    number: int,
    layer: Layer,
    x: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    step: Step,
) -> torch.Tensor:
    """(n, heads * head_dim)."""
    qkv = layer.qkv(x, norm=layer.attention_norm)
    query = rotate_append(qkv, rotation, step.slots, cache.keys[number], cache.values[number], weights.heads(layer))
    keys, values = cache.keys[number][step.context], cache.values[number][step.context]
    counts, lengths = [span.count for span in step.spans], [span.length for span in step.spans]
    if step.borders is not None:
        longest = (max(counts), max(lengths))
        return attend_contexts(query, keys, values, step.borders, longest).flatten(1)
    parts = zip(query.split(counts), keys.split(lengths), values.split(lengths), strict=True)
    return torch.cat([attend(*part) for part in parts]).flatten(1)


def rotate_append(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Heads,
) -> torch.Tensor:
    """(n, H, D) queries of (n, (H + 2 KV) D), normalised and turned; keys and values are written to ``slots`` (n,) of
    (slots, KV, D)."""
    if runs_triton(qkv):
        from grace_vlm.kernels.decoder_rows_triton import rotate_append as fused

        return fused(qkv, rotation, slots, keys, values, heads)
    h, kv = heads.num_heads, heads.num_kv_heads
    query, key, value = qkv.view(len(qkv), h + 2 * kv, heads.head_dim).split([h, kv, kv], dim=1)
    if heads.query_norm is not None and heads.key_norm is not None:
        query = normalized(query, Norm(heads.query_norm, heads.epsilon))
        key = normalized(key, Norm(heads.key_norm, heads.epsilon))
    cos, sin = (part.unsqueeze(1) for part in rotation)
    keys.index_copy_(0, slots, rotated(key, cos, sin))
    values.index_copy_(0, slots, value)
    return rotated(query, cos, sin)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (n, heads, d): the first half turns with the second; cos, sin (n, 1, d)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(n, heads, d): causal attention of the last n tokens of a context of (L, kv_heads, d), n <= L."""
    count, length = len(query), len(keys)
    mask = None
    if 1 < count < length:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values))
    grouped = query.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < count == length, enable_gqa=grouped)
    return out[0].transpose(0, 1)
