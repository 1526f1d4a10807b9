"""One forward of the decoder over tokens of many requests that lie end to end.

    x    (n, d)   embeddings, visual tokens' rows replaced by their pictures'
    layer         x += attention(norm(x));  x += mlp(norm(x));  DeepStack rows are added after the first layers
    out  (r, d)   after the last norm, of the rows that are wanted

A request's rows are a ``Span``: they follow tokens that are in the cache already. A prompt in pieces, a whole prompt
and a single new token are the same to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grace_vlm.engine.cache import KeyValueCache
from grace_vlm.engine.layers import Layer, Weights
from grace_vlm.kernels.cache_rows import read_rows
from grace_vlm.kernels.decoder_rows import rms_norm, rotate_append
from grace_vlm.kernels.paged_attention import attend
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
        borders: of rows and of contexts, where one kernel attends for all spans; None: it is done size by size, over
            spans of one size that are neighbours, or span by span if they are ``alone``.
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
    alone: bool = False


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
    return rms_norm(x.index_select(0, step.wanted), weights.last_norm)


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
    # The rows' own too come as the cache keeps them, so that it changes nothing where a prompt is cut.
    keys, values = (read_rows(kept[number], step.context, x.dtype) for kept in (cache.keys, cache.values))
    if step.borders is not None:
        longest = (max(span.count for span in step.spans), max(span.length for span in step.spans))
        return attend_contexts(query, keys, values, step.borders, longest).flatten(1)
    sizes = [(span, 1) for span in step.spans] if step.alone else _sizes(step.spans)
    counts, lengths = [span.count * many for span, many in sizes], [span.length * many for span, many in sizes]
    parts = zip(query.split(counts), keys.split(lengths), values.split(lengths), strict=True)
    attended = [
        attend(*(x.unflatten(0, (many, -1)) for x in part)).flatten(0, 1)
        for (_, many), part in zip(sizes, parts, strict=True)
    ]
    return torch.cat(attended).flatten(1)


def _sizes(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Neighbours that are alike, and how many."""
    return [(span, len(list(alike))) for span, alike in itertools.groupby(spans)]
