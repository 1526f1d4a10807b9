"""Pictures of a data set as patch tensors, each decoded at most once while it fits the budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grace_vlm.media.image import LoadedImage
from grace_vlm.models.adapter import Grid


@dataclass(frozen=True)
class Picture:
    """One picture of a batch.

    Args:
        key: its name in the data set; caches are keyed by it.
        grid: (t, h, w) in patches.
        pixels: (n_patches, patch_dim) FP32, or None where the tower's output is already kept.
    """

    key: str
    grid: Grid
    pixels: torch.Tensor | None


class PictureStore:
    """Patchifies pictures with a model's own image processor; keeps patches up to ``budget_bytes``, grids for ever.

    Kept patches live on ``device`` (default: the host), where the tower wants them.
    """

    def __init__(self, image_processor: Any, budget_bytes: int = 0, device: torch.device | None = None) -> None:
        self.image_processor, self.budget_bytes, self.device = image_processor, budget_bytes, device
        self._grids: dict[str, Grid] = {}
        self._pixels: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._held_bytes = 0

    def find(self, name: str, with_pixels: bool = True) -> Picture | None:
        """The picture if what is asked for is here, else None: decode it and ``add`` it."""
        if name not in self._grids or (with_pixels and name not in self._pixels):
            return None
        return Picture(name, self._grids[name], self._pixels[name] if with_pixels else None)

    def add(self, name: str, loaded: LoadedImage) -> Picture:
        """Patchify a decoded picture; the oldest patches leave when the budget is full."""
        return self.add_many([(name, loaded)])[0]

    def add_many(self, decoded: Sequence[tuple[str, LoadedImage]]) -> list[Picture]:
        """``add`` for several: one call of the processor, which stacks pictures of one size."""
        features = self.image_processor(images=[loaded.image for _, loaded in decoded], return_tensors="pt")
        grids = [(t, h, w) for t, h, w in features["image_grid_thw"].tolist()]
        parts = features["pixel_values"].split([t * h * w for t, h, w in grids])
        # A part of a stacked tensor would keep all of it alive.
        return [self._keep(name, g, part.clone()) for (name, _), g, part in zip(decoded, grids, parts, strict=True)]

    def _keep(self, name: str, grid: Grid, pixels: torch.Tensor) -> Picture:
        if self.budget_bytes and self.device is not None:
            pixels = pixels.to(self.device)
        self._grids[name] = grid
        num_bytes = pixels.numel() * pixels.element_size()
        if num_bytes <= self.budget_bytes:
            while self._held_bytes + num_bytes > self.budget_bytes:
                _, dropped = self._pixels.popitem(last=False)
                self._held_bytes -= dropped.numel() * dropped.element_size()
            self._pixels[name] = pixels
            self._held_bytes += num_bytes
        return Picture(name, grid, pixels)
