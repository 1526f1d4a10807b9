"""Qwen2-VL and Qwen2.5-VL: one decoder, one merger, two towers.

Qwen2.5-VL's tower attends in windows in most layers and works on patches in window order, four by four, as the merger
takes them. Its output is put back in the order of the grid here, so that what is kept of a picture, and the merger
after it, are those of Qwen2-VL. Its windows differ in size, so it keeps Transformers' own loop over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from grace_vlm.kernels.upload import upload_cat
from grace_vlm.models.adapter import DecoderStates, Grid, TowerOutput
from grace_vlm.models.decoder import place_visual, run_decoder
from grace_vlm.models.look_up import look_up
from grace_vlm.models.qwen_vision import Tables, mrope_positions, patchify_grids, run_grids
from grace_vlm.quant.plan import Part


@lru_cache(maxsize=64)
def _grid_tables(grid: Grid, merge: int, device: torch.device) -> Tables:
    from transformers.vision_utils import get_vision_position_ids

    with torch.inference_mode(False):
        return {"position_ids": get_vision_position_ids(torch.tensor([grid]), merge).to(device)}


class Qwen2VLAdapter:
    """``Qwen2VLForConditionalGeneration``. Language model and merger are trained, the tower is not."""

    model_type = "qwen2_vl"
    parts: Mapping[Part, str] = {
        "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "projector": r"model\.visual\.merger\.mlp\.[02]",
        "tower": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc[12]|(gate|up|down)_proj))",
        "head": r"lm_head|model\.language_model\.embed_tokens",
    }
    frozen: tuple[str, ...] = ("model.visual.patch_embed.", "model.visual.blocks.")
    stored_names: tuple[tuple[str, str], ...] = (("model.language_model.", "model."), ("model.visual.", "visual."))

    def image_token_id(self, config: Any) -> int:
        return config.image_token_id

    def num_visual_tokens(self, config: Any, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // config.vision_config.spatial_merge_size**2

    def positions(self, config: Any, input_ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
        """M-RoPE in sections."""
        return mrope_positions(config.image_token_id, config.vision_config.spatial_merge_size, input_ids, grids)

    def patchify(self, config: Any, image_processor: Any, images: Sequence[Any]) -> list[tuple[Grid, torch.Tensor]]:
        return patchify_grids(image_processor, images)

    def head(self, model: Any) -> nn.Linear:
        return model.lm_head

    def tower(self, model: Any, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[TowerOutput]:
        visual = model.model.visual
        device, merge = visual.patch_embed.proj.weight.device, visual.spatial_merge_size
        return run_grids(visual, pixels, grids, lambda grid: _grid_tables(grid, merge, device))

    def merge(self, model: Any, vision: Sequence[TowerOutput]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        return model.model.visual.merger(torch.cat([p.hidden for p in vision])) if vision else None, []

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
        merged, _ = self.merge(model, vision)
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
        )


class Qwen25VLAdapter(Qwen2VLAdapter):
    """``Qwen2_5_VLForConditionalGeneration``: Qwen2-VL with a tower that attends in windows."""

    model_type = "qwen2_5_vl"

    def tower(self, model: Any, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[TowerOutput]:
        from transformers.vision_utils import get_vision_window_index

        visual = model.model.visual
        weight = visual.patch_embed.proj.weight
        grid_thw = torch.tensor(grids)
        window_index, _ = get_vision_window_index(
            grid_thw, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        patches = upload_cat(pixels, weight.device).to(weight.dtype)
        state = visual(patches, grid_thw=grid_thw.to(weight.device))
        in_windows = state.last_hidden_state
        tokens = in_windows.reshape(len(window_index), -1, in_windows.shape[-1])
        in_grid = tokens[torch.argsort(window_index).to(tokens.device)].reshape(in_windows.shape)
        return [TowerOutput(part) for part in in_grid.split([t * h * w for t, h, w in grids])]
