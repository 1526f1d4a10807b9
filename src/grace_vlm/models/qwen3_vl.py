"""Qwen3-VL (dense): the names of its parts and the order in which they run.

Transformers 5.17 and 5.23 attend picture by picture in a Python loop under SDPA. Pictures of one grid need no loop:
they are one batch for the attention. ``tower`` says so through an attention function of ours and one "sequence" that
holds all of them. The positions of a grid are made once and repeated: the stock tower makes them picture by picture,
some thirty small operations each, which on a GPU is most of a small step. Everything else is the stock tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from grace_vlm.models.adapter import DecoderStates, Grid, TowerOutput

_ATTENTION_NAME = "grace_equal_grids"


def _attend_equal_grids(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """SDPA over (1, heads, pictures * patches, d) as a batch of ``num_pictures``."""
    num_pictures: int = kwargs["num_pictures"]
    heads, total, dim = query.shape[1:]

    def by_picture(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(heads, num_pictures, total // num_pictures, dim).transpose(0, 1)

    out = F.scaled_dot_product_attention(by_picture(query), by_picture(key), by_picture(value), scale=kwargs["scaling"])
    return out.permute(0, 2, 1, 3).reshape(1, total, heads, dim), None


@lru_cache(maxsize=64)
def _grid_positions(grid: Grid, side: int, merge: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the stock tower derives from one grid, by the keyword that takes it ready-made; first axis: patches."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    # Kept for training too, whoever asks first: what inference mode makes, autograd refuses.
    with torch.inference_mode(False):
        one = torch.tensor([grid])
        indices, weights = get_vision_interpolation_indices_and_weights(
            one, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
        )
        tables = {
            "interp_indices": indices,
            "interp_weights": weights,
            "position_ids": get_vision_position_ids(one, merge),
        }
        return {name: table.to(device) for name, table in tables.items()}


class Qwen3VLAdapter:
    """``Qwen3VLForConditionalGeneration``. Language model and merger are trained, the tower and DeepStack are not."""

    model_type = "qwen3_vl"
    quantizable = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    frozen: tuple[str, ...] = (
        "model.visual.patch_embed.",
        "model.visual.pos_embed.",
        "model.visual.blocks.",
        "model.visual.deepstack_merger_list.",
    )

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id

    def num_visual_tokens(self, model: Any, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // model.config.vision_config.spatial_merge_size**2

    def positions(self, model: Any, input_ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
        """Interleaved M-RoPE: text counts on all three axes; a picture counts t, h, w from where it starts, and the
        text after it goes on from its longest side."""
        merge = model.config.vision_config.spatial_merge_size
        is_visual = input_ids == self.image_token_id(model)
        out = np.empty((3, len(input_ids)), dtype=np.int64)
        at, position = 0, 0
        for t, h, w in grids:
            start = at + int(np.argmax(is_visual[at:]))
            out[:, at:start] = np.arange(position, position + start - at)
            position += start - at
            axes = np.meshgrid(np.arange(t), np.arange(h // merge), np.arange(w // merge), indexing="ij")
            at = start + axes[0].size
            out[:, start:at] = np.stack([axis.reshape(-1) for axis in axes]) + position
            position += max(h, w) // merge
        out[:, at:] = np.arange(position, position + len(input_ids) - at)
        return out

    def head(self, model: Any) -> nn.Linear:
        return model.lm_head

    def tower(self, model: Any, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[TowerOutput]:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION_NAME, _attend_equal_grids)
        visual = model.model.visual
        device, dtype = visual.patch_embed.proj.weight.device, visual.patch_embed.proj.weight.dtype
        outputs: dict[int, TowerOutput] = {}
        stock, visual.config._attn_implementation = visual.config._attn_implementation, _ATTENTION_NAME
        try:
            for grid in sorted(set(grids)):
                members = [i for i, other in enumerate(grids) if other == grid]
                patches = torch.cat([pixels[i].to(device, non_blocking=True) for i in members]).to(dtype)
                config = visual.config
                positions = _grid_positions(grid, visual.num_grid_per_side, config.spatial_merge_size, device)
                state = visual(
                    patches,
                    grid_thw=torch.tensor([grid] * len(members)),
                    cu_seqlens=torch.tensor([0, patches.shape[0]], dtype=torch.int32),
                    num_pictures=len(members) * grid[0],
                    **{name: table.repeat(len(members), 1) for name, table in positions.items()},
                )
                hidden = state.last_hidden_state.chunk(len(members))
                deepstack = [layer.chunk(len(members)) for layer in state.deepstack_features]
                for j, i in enumerate(members):
                    outputs[i] = TowerOutput(hidden[j], tuple(layer[j] for layer in deepstack))
        finally:
            visual.config._attn_implementation = stock
        return [outputs[i] for i in range(len(grids))]

    def decode(
        self,
        model: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        vision: Sequence[TowerOutput],
        *,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        tap: int | None = None,
    ) -> DecoderStates:
        language = model.model.language_model
        embeds = language.embed_tokens(input_ids)
        visual_mask = input_ids == self.image_token_id(model)
        deepstack: list[torch.Tensor] | None = None
        if vision:
            merged = model.model.visual.merger(torch.cat([picture.hidden for picture in vision]))
            embeds = embeds.masked_scatter(visual_mask.unsqueeze(-1), merged.to(embeds.dtype))
            deepstack = [torch.cat(layer) for layer in zip(*(picture.deepstack for picture in vision), strict=True)]
        tapped: list[torch.Tensor] = []
        hook = None
        if tap is not None:
            # hidden_states[-2] is what enters the last layer, with any DeepStack addition already made.
            layer = language.layers[len(language.layers) + 1 + tap if tap < 0 else tap]
            hook = layer.register_forward_pre_hook(lambda _, args: tapped.append(args[0]))
        try:
            out = language(
                inputs_embeds=embeds,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=cache is not None,
                visual_pos_masks=visual_mask if vision else None,
                deepstack_visual_embeds=deepstack,
            )
        finally:
            if hook is not None:
                hook.remove()
        return DecoderStates(out.last_hidden_state, tapped[0][visual_mask] if tapped else None)
