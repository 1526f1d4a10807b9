"""One forward of a decoder: what all architectures share.

Training runs the layers of a Transformers decoder itself (``_run_layers``); generation, which has a cache and a mask,
goes through the decoder's own ``forward`` under SDPA. The loop here is that forward without what makes a GPU wait or a
compiler give up: visual tokens are found by positions that the host knows and not by a boolean mask, which CUDA must
count first; a layer's input is taken between two layers and not by a hook inside one; and which layers are computed
again in the backward pass is said layer by layer (``Recompute``).

Samples that lie end to end in one row (packing) are kept apart in attention by their lengths; without lengths it is
plain causal SDPA. It needs no mask: a (S, S) mask is 64 MiB at 8,192 tokens and rules out the fast kernels.

The attention of a forward is written into the decoder's configuration. Where gradients are made it stays written:
layers that run again in the backward pass must attend as they did in the forward. The model's own ``forward`` and
``generate`` then meet it too, so it takes the masks that Transformers makes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grace_vlm.errors import ConfigError
from grace_vlm.kernels.upload import upload
from grace_vlm.models.adapter import DecoderStates

_SEGMENTS = "grace_segments"
GRAPHS = "grace_layer_graphs"
"""Attribute of a decoder whose layers run as CUDA graphs (``graphs.py``)."""
SHARDS = "grace_layer_shards"
"""Attribute of a decoder whose layers' weights, or their gradients, are shared out to processes (``Shards``)."""


class Shards(Protocol):
    """Who brings the weights of layers and takes their gradients (``train.shards``)."""

    def enter(self, number: int, hidden: torch.Tensor) -> None:
        """A layer is about to compute on ``hidden``."""
        ...

    def leave(self, number: int, hidden: torch.Tensor) -> None:
        """It has computed ``hidden``."""
        ...


def attend_segments(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    segments: tuple[int, ...] | None = None,
    borders: torch.Tensor | None = None,
    longest: int | None = None,
    causal: dict[str, Any] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment, over all of it; with a mask, or one token to a cache, stock SDPA.

    Args:
        query: (B, heads, S, d). key, value: (B, kv_heads, S, d); B is 1 with segments.
        attention_mask: (B, 1, S, keys), what the model's own forward makes; None from ours.
        segments: lengths that sum to S; None: every row is one segment.
        borders: (len(segments) + 1,) int32 on the device, 0 and the ends of the segments; instead of ``segments``
            where one kernel does all of them: a compiled layer is then the same for every packing.
        longest: not below the longest segment. causal: ``_causal()``, which a compiler cannot ask.

    Returns:
        (B, S, heads, d), None.
    """
    if attention_mask is not None or query.shape[2] == 1:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)[0]
        return out, None
    grouped = query.shape[1] != key.shape[1]
    longest = longest if longest is not None else max(segments) if segments is not None else query.shape[2]
    if sliding_window is not None and longest > sliding_window:
        raise ConfigError(
            f"this model attends in a sliding window of {sliding_window} tokens and a row has {longest}, which is not "
            "trained; set data.max_tokens to the window or use_sliding_window to false in its config.json"
        )
    if borders is not None:
        assert causal is not None
        return attend_varlen(query, key, value, scaling, borders, longest, causal), None
    if segments is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous(), None
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*(x.split(list(segments), dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def attend_contexts(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    borders: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    causal: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of several contexts, in one kernel, for ``has_varlen``.

    Keys are repeated to the query's heads: torch 2.11 has no grouped form of it.

    Args:
        query: (n, heads, d). keys, values: (m, kv_heads, d), contexts end to end; the last keys of each are those of
            its queries.
        borders, longest: of queries and of contexts, as ``attend_segments`` has them.
        causal: ``_causal()`` where a compiler cannot ask; nothing in it for attention over all of a context.
    """
    from torch.nn.attention.varlen import varlen_attn

    how = _causal() if causal is None else causal
    repeats = query.shape[1] // keys.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (keys, values))
    out: Any = varlen_attn(query.contiguous(), k.contiguous(), v.contiguous(), *borders, *longest, **how)
    return out


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    borders: torch.Tensor,
    longest: int,
    causal: dict[str, Any],
) -> torch.Tensor:
    """All segments in one kernel; ``causal``: what says so to it, nothing for attention over all of a segment."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    default = query.shape[-1] ** -0.5
    if scaling is not None and scaling != default:
        q = q * (scaling / default)
    return attend_contexts(q, k, v, (borders, borders), (longest, longest), causal).unsqueeze(0)


def has_varlen(x: torch.Tensor) -> bool:
    """Whether ``attend_varlen`` can take such tensors."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


@functools.cache
def _causal() -> dict[str, Any]:
    """How ``varlen_attn`` is told to be causal; it changed between torch 2.11 and 2.14."""
    from torch.nn.attention.varlen import varlen_attn

    is_new = "is_causal" not in inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if is_new else {"is_causal": True}


@contextmanager
def attention(module: Any, name: str, function: Callable[..., Any] | None = None) -> Iterator[None]:
    """``module`` (a Transformers model with a configuration) attends by ``name`` inside the block, and after it where
    gradients are made: its layers may run again in the backward pass."""
    if function is not None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)  # unregistered names get no mask and attend to padding
    before = module.config._attn_implementation
    module.config._attn_implementation = name
    try:
        yield
    finally:
        if not torch.is_grad_enabled():
            module.config._attn_implementation = before


def run_decoder(
    language: Any,
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    visual: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    cache: Any,
    tap: int | None,
    segments: tuple[int, ...] | None,
    recompute: int = 0,
    deepstack: Sequence[torch.Tensor] = (),
) -> DecoderStates:
    """The decoder on embeddings, with the input of one layer tapped at the visual tokens.

    Args:
        language: a Transformers decoder with ``rotary_emb``, ``layers`` and ``norm``. embeds: (B, S, d).
        position_ids: as the decoder takes them. visual: (n_visual,) flat positions of the visual tokens.
        deepstack: (n_visual, d) each, added to the visual tokens after the first layers, one after each.
        Others as ``Adapter.decode``.
    """
    num_layers = len(language.layers)
    # hidden_states[-2] is what enters the last layer, with any DeepStack addition already made.
    tapped_layer = None if tap is None else num_layers + 1 + tap if tap < 0 else tap
    if attention_mask is None and cache is None:
        rotary, graphs = language.rotary_emb(embeds, position_ids), getattr(language, GRAPHS, None)
        with attention(language, _SEGMENTS, attend_segments):
            if graphs is not None and segments is not None:
                found = graphs.run(embeds, rotary, segments, visual, tapped_layer, recompute, deepstack)
                if found is not None:
                    return DecoderStates(language.norm(found[0]), found[1])
            how = segment_arguments(segments, embeds)
            return _run_layers(language, embeds, rotary, visual, tapped_layer, recompute, deepstack, how)
    assert segments is None, "packed rows have neither mask nor cache"
    with attention(language, "sdpa"):
        return _run_stock(language, embeds, position_ids, visual, tapped_layer, deepstack, attention_mask, cache)


def _run_layers(
    language: Any,
    embeds: torch.Tensor,
    rotary: Any,
    visual: torch.Tensor,
    tapped_layer: int | None,
    recompute: int,
    deepstack: Sequence[torch.Tensor],
    how: dict[str, Any],
) -> DecoderStates:
    """Layer by layer; ``rotary``: what every layer turns by, ``how``: its other arguments."""
    hidden, tapped = embeds, None
    shards: Shards | None = getattr(language, SHARDS, None)
    for number, layer in enumerate(language.layers):
        if number == tapped_layer:
            tapped = hidden.flatten(0, 1).index_select(0, visual)
        if shards is not None:
            shards.enter(number, hidden)
        if number < recompute and torch.is_grad_enabled():
            hidden = checkpoint(
                layer, hidden, position_embeddings=rotary, use_reentrant=False, preserve_rng_state=False, **how
            )
        else:
            hidden = layer(hidden, position_embeddings=rotary, **how)
        if shards is not None:
            shards.leave(number, hidden)
        if number < len(deepstack):
            added = hidden.flatten(0, 1).index_add(0, visual, deepstack[number].to(hidden.dtype))
            hidden = added.view(hidden.shape)
    return DecoderStates(language.norm(hidden), tapped)


def _run_stock(
    language: Any,
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    visual: torch.Tensor,
    tapped_layer: int | None,
    deepstack: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    cache: Any,
) -> DecoderStates:
    """The decoder's own forward."""
    tapped: list[torch.Tensor] = []
    hook = None
    if tapped_layer is not None:
        hook = language.layers[tapped_layer].register_forward_pre_hook(lambda _, args: tapped.append(args[0]))
    extra: dict[str, Any] = {}
    if deepstack:
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        mask.view(-1)[visual] = True
        extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(deepstack)}
    try:
        out = language(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
    finally:
        if hook is not None:
            hook.remove()
    return DecoderStates(out.last_hidden_state, tapped[0].flatten(0, 1)[visual] if tapped else None)


def segment_arguments(segments: tuple[int, ...] | None, embeds: torch.Tensor) -> dict[str, Any]:
    """What the layers are told of the segments: their borders on the device if one kernel does them all."""
    arguments: dict[str, Any] = {"attention_mask": None}
    if segments is not None and has_varlen(embeds):
        arguments |= {"borders": borders_of(segments, embeds.device), "longest": max(segments), "causal": _causal()}
    elif segments is not None:
        arguments["segments"] = segments
    return arguments


def borders_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """(n + 1,) int32 on the device: 0 and where each of n segments that lie end to end ends."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    return upload(ends, device)


def place_visual(
    embeds: torch.Tensor,
    input_ids: torch.Tensor,
    image_token_id: int,
    merged: torch.Tensor | None,
    visual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeds (B, S, d) with the visual tokens' rows replaced by ``merged`` (n_visual, d), their flat positions).

    ``visual``: those positions if the caller knows them; None looks for the token, which a GPU must wait for.
    """
    if visual is None:
        visual = (input_ids.flatten() == image_token_id).nonzero().squeeze(1)
    if merged is not None:
        placed = embeds.flatten(0, 1).index_copy(0, visual, merged.to(embeds.dtype))
        embeds = placed.view(embeds.shape)
    return embeds, visual
