"""One forward of a decoder: what all architectures share.

Attention has two forms here. Rows of a padded batch, and anything with a cache or a mask, go through Transformers' own
SDPA. Samples that lie end to end in one row (packing) go through ``attend_segments``, which keeps them apart by their
lengths; without lengths it is plain causal SDPA. It needs no mask, and Transformers makes none for an attention
function that registers none: a (S, S) mask is 64 MiB at 8,192 tokens and rules out the fast kernels.

The choice is written into the decoder's configuration for the call. With gradient checkpointing it stays written:
layers run again in the backward pass, and must attend as they did in the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import DecoderStates

_SEGMENTS = "grace_segments"


def attend_segments(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    segments: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment, over all of it.

    Args:
        query: (B, heads, S, d). key, value: (B, kv_heads, S, d); B is 1 with segments.
        segments: lengths that sum to S; None: every row is one segment.

    Returns:
        (B, S, heads, d), None.
    """
    assert attention_mask is None
    longest = max(segments) if segments is not None else query.shape[2]
    if sliding_window is not None and longest > sliding_window:
        raise ConfigError(
            f"this model attends in a sliding window of {sliding_window} tokens and a row has {longest}, which is not "
            "trained; set data.max_tokens to the window or use_sliding_window to false in its config.json"
        )
    grouped = query.shape[1] != key.shape[1]
    if segments is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous(), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _attend_varlen(query, key, value, scaling, segments), None
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*(x.split(list(segments), dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, segments: tuple[int, ...]
) -> torch.Tensor:
    """All segments in one kernel. Keys are repeated to the query's heads: torch 2.11 has no grouped form of it."""
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
    ends = torch.tensor((0, *segments), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    ends = ends.to(query.device, non_blocking=True)
    longest = max(segments)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    default = query.shape[-1] ** -0.5
    if scale != default:
        q = q * (scale / default)
    # How a kernel is told to be causal changed between torch 2.11 and 2.14.
    causal: dict[str, Any] = {"window_size": (-1, 0)}
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        causal = {"is_causal": True}
    out: Any = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), ends, ends, longest, longest, **causal)
    return out.unsqueeze(0)


@contextmanager
def attention(module: Any, name: str, function: Callable[..., Any] | None = None) -> Iterator[None]:
    """``module`` (a Transformers model with a configuration) attends by ``name`` inside the block, and after it if
    its layers will be recomputed."""
    if function is not None:
        from transformers import AttentionInterface

        AttentionInterface.register(name, function)
    before = module.config._attn_implementation
    module.config._attn_implementation = name
    try:
        yield
    finally:
        if not (getattr(module, "gradient_checkpointing", False) and torch.is_grad_enabled()):
            module.config._attn_implementation = before


def run_decoder(
    language: Any,
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    visual_mask: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    cache: Any,
    tap: int | None,
    segments: tuple[int, ...] | None,
    **extra: Any,
) -> DecoderStates:
    """The decoder on embeddings, with the input of one layer tapped at the visual tokens.

    Args:
        language: a Transformers decoder with ``layers``. embeds: (B, S, d). visual_mask: (B, S) bool.
        position_ids: as the decoder takes them. Others as ``Adapter.decode``; ``extra`` goes to the decoder.
    """
    tapped: list[torch.Tensor] = []
    hook = None
    if tap is not None:
        # hidden_states[-2] is what enters the last layer, with any DeepStack addition already made.
        layer = language.layers[len(language.layers) + 1 + tap if tap < 0 else tap]
        hook = layer.register_forward_pre_hook(lambda _, args: tapped.append(args[0]))
    is_plain = attention_mask is None and cache is None
    assert is_plain or segments is None, "packed rows have neither mask nor cache"
    chosen = attention(language, _SEGMENTS, attend_segments) if is_plain else attention(language, "sdpa")
    if segments is not None:
        extra["segments"] = segments
    try:
        with chosen:
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
    return DecoderStates(out.last_hidden_state, tapped[0][visual_mask] if tapped else None)


def place_visual(
    embeds: torch.Tensor, input_ids: torch.Tensor, image_token_id: int, merged: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeds with the visual tokens' rows replaced by ``merged`` (n_visual, d), mask (B, S) of those rows)."""
    mask = input_ids == image_token_id
    if merged is not None:
        embeds = embeds.masked_scatter(mask.unsqueeze(-1), merged.to(embeds.dtype))
    return embeds, mask
