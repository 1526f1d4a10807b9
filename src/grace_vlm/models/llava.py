"""LLaVA-1.5: a CLIP tower of fixed size, a two-layer projector, a Llama decoder with plain positions.

Transformers' layout is opened as it is; the original layout (``mm_projector`` keys, external tower) is converted when
it is opened (``llava_layout.py``). The whole tower is frozen; the projector is trained with the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from grace_vlm.kernels.upload import upload_cat
from grace_vlm.models.adapter import DecoderStates, Grid, TowerOutput
from grace_vlm.models.decoder import place_visual, run_decoder
from grace_vlm.models.look_up import look_up
from grace_vlm.quant.plan import Part

_STACKED = 16
"""Pictures of one call of the image processor: larger stacks are fresh memory each time, at half the speed."""


class LlavaAdapter:
    """``LlavaForConditionalGeneration``. Language model and projector are trained, the tower is not."""

    model_type = "llava"
    parts: Mapping[Part, str] = {
        "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "projector": r"model\.multi_modal_projector\.linear_[12]",
        "tower": r"model\.vision_tower\..*layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
        "head": r"lm_head|model\.language_model\.embed_tokens",
    }
    frozen: tuple[str, ...] = ("model.vision_tower.",)
    stored_names: tuple[tuple[str, str], ...] = (
        ("model.language_model.", "language_model.model."),
        # The hub's name of CLIP's layers, which every release of Transformers reads; newer ones write none.
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head", "language_model.lm_head"),
    )

    def image_token_id(self, config: Any) -> int:
        return config.image_token_id

    def num_visual_tokens(self, config: Any, grid: Grid) -> int:
        # The "default" strategy drops the class token, "full" keeps it.
        return grid[0] * (grid[1] * grid[2] + (config.vision_feature_select_strategy == "full"))

    def positions(self, config: Any, input_ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
        """0, 1, 2, ... on all axes: visual tokens count like words."""
        return np.broadcast_to(np.arange(len(input_ids)), (3, len(input_ids))).copy()

    def patchify(self, config: Any, image_processor: Any, images: Sequence[Any]) -> list[tuple[Grid, torch.Tensor]]:
        """(1, height, width) in patches and (3, H, W) of each picture."""
        size = config.vision_config.patch_size
        found: list[tuple[Grid, torch.Tensor]] = []
        for first in range(0, len(images), _STACKED):
            some = list(images[first : first + _STACKED])
            pixels = torch.stack(list(image_processor(images=some, return_tensors="pt")["pixel_values"]))
            found += [((1, part.shape[1] // size, part.shape[2] // size), part.clone()) for part in pixels]
        return found

    def head(self, model: Any) -> nn.Linear:
        return model.lm_head

    def tower(self, model: Any, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[TowerOutput]:
        tower, config = model.model.vision_tower, model.config
        weight = next(tower.parameters())
        images = upload_cat(pixels, weight.device).view(len(pixels), *pixels[0].shape).to(weight.dtype)
        states = tower(images, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return [TowerOutput(hidden) for hidden in torch.cat(chosen, dim=-1)]

    def merge(self, model: Any, vision: Sequence[TowerOutput]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        return model.model.multi_modal_projector(torch.cat([p.hidden for p in vision])) if vision else None, []

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
            position_ids[0],
            visual,
            attention_mask=attention_mask,
            cache=cache,
            tap=tap,
            segments=segments,
            recompute=recompute,
        )
