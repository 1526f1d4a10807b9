"""Qwen3-VL (dense): the names of its parts and the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from grace_vlm.models.adapter import DecoderStates, Grid, TowerOutput
from grace_vlm.models.decoder import place_visual, run_decoder
from grace_vlm.models.look_up import look_up
from grace_vlm.models.qwen_vision import Tables, mrope_positions, patchify_grids, run_grids
from grace_vlm.quant.plan import Part


@lru_cache(maxsize=64)
def _grid_tables(grid: Grid, side: int, merge: int, device: torch.device) -> Tables:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    # Kept for training too, whoever asks first: what inference mode makes, autograd refuses.
    with torch.inference_mode(False):
        one = torch.tensor([grid])
        indices, weights = get_vision_interpolation_indices_and_weights(
            one, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
        )
        positions = get_vision_position_ids(one, merge)
        tables = {"interp_indices": indices, "interp_weights": weights, "position_ids": positions}
        return {name: table.to(device) for name, table in tables.items()}


class Qwen3VLAdapter:
    """``Qwen3VLForConditionalGeneration``. Language model and merger are trained, the tower and DeepStack are not."""

    model_type = "qwen3_vl"
    parts: Mapping[Part, str] = {
        "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "projector": r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
        "tower": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        "head": r"lm_head|model\.language_model\.embed_tokens",
    }
    frozen: tuple[str, ...] = (
        "model.visual.patch_embed.",
        "model.visual.pos_embed.",
        "model.visual.blocks.",
        "model.visual.deepstack_merger_list.",
    )
    stored_names: tuple[tuple[str, str], ...] = ()

    def image_token_id(self, config: Any) -> int:
        return config.image_token_id

    def num_visual_tokens(self, config: Any, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // config.vision_config.spatial_merge_size**2

    def positions(self, config: Any, input_ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
        """Interleaved M-RoPE."""
        return mrope_positions(config.image_token_id, config.vision_config.spatial_merge_size, input_ids, grids)

    def patchify(self, config: Any, image_processor: Any, images: Sequence[Any]) -> list[tuple[Grid, torch.Tensor]]:
        return patchify_grids(image_processor, images)

    def head(self, model: Any) -> nn.Linear:
        return model.lm_head

    def tower(self, model: Any, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[TowerOutput]:
        visual = model.model.visual
        device, merge = visual.patch_embed.proj.weight.device, visual.config.spatial_merge_size
        side: int = visual.num_grid_per_side
        return run_grids(visual, pixels, grids, lambda grid: _grid_tables(grid, side, merge, device))

    def merge(self, model: Any, vision: Sequence[TowerOutput]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        if not vision:
            return None, []
        merged = model.model.visual.merger(torch.cat([picture.hidden for picture in vision]))
        return merged, [torch.cat(layer) for layer in zip(*(picture.deepstack for picture in vision), strict=True)]

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
        segments: tuple[int, ...] | None = None,
        visual: torch.Tensor | None = None,
        recompute: int = 0,
    ) -> DecoderStates:
        language = model.model.language_model
        merged, deepstack = self.merge(model, vision)
        embeds = look_up(language.embed_tokens, input_ids)
        embeds, visual = place_visual(embeds, input_ids, model.config.image_token_id, merged, visual)
        return run_decoder(
            language,
            embeds,
            position_ids,
            visual,
            attention_mask=attention_mask,
            cache=cache,
            tap=tap,
            segments=segments,
            recompute=recompute,
            deepstack=deepstack,
        )
