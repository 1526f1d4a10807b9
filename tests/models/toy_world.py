"""Pictures and prompts of the model tests, and what the stock processor makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from grace_vlm.models.adapter import Adapter

TEXTS = ["what shape is in the picture?", "is there a red circle?", "a blue triangle", "yes", "no"]
SIZES = ((128, 128), (64, 200), (128, 128), (160, 128), (256, 256), (64, 200))


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class World:
    processor: Any
    model: Any
    adapter: Adapter

    def inputs(self, rows: list[list[str]], padding_side: str = "right") -> Any:
        """Stock processor inputs: each row is a list of parts, ``"<WxH>"`` a picture of that size, else text."""
        texts, images = [], []
        for row in rows:
            content = []
            for part in row:
                if part.startswith("<"):
                    width, height = part.strip("<>").split("x")
                    images.append(picture(int(width), int(height), len(images)))
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part})
            messages = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        self.processor.tokenizer.padding_side = padding_side
        return self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")

    def grids(self, inputs: Any) -> list[tuple[int, int, int]]:
        if "image_grid_thw" not in inputs:
            return []
        return [(t, h, w) for t, h, w in inputs["image_grid_thw"].tolist()]

    def pixels(self, inputs: Any) -> list[torch.Tensor]:
        grids = self.grids(inputs)
        return list(inputs["pixel_values"].split([t * h * w for t, h, w in grids])) if grids else []

    def positions(self, inputs: Any) -> torch.Tensor:
        """(3, B, S) by the adapter, row by row without the padding; pads keep 0."""
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy().astype(bool)
        out = np.zeros((3, *ids.shape), dtype=np.int64)
        grids = iter(self.grids(inputs))
        start = self.model.config.vision_start_token_id
        for row in range(ids.shape[0]):
            real = ids[row][mask[row]]
            own = [next(grids) for _ in range(int((real == start).sum()))]
            out[:, row, mask[row]] = self.adapter.positions(self.model.config, real, own)
        return torch.from_numpy(out)
