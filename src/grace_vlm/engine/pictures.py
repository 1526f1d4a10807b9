"""What the decoder is given of pictures: made once a picture, kept by the picture's content.

Tower and merger run for every picture that is not kept. What is kept is found by SHA-256 of grid and pixels, all 256
bits of it, so that two pictures are never taken for one; the picture that was asked for longest ago leaves first.
On a CPU pictures that come together are made together; on a GPU one by one, each a recording.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from grace_vlm.data.row_key import pixels_digest
from grace_vlm.engine.recorded import RecordedPictures
from grace_vlm.engine.request import EngineImage, Features
from grace_vlm.kernels.upload import upload
from grace_vlm.models.adapter import Adapter, Grid

PATCHES_AT_ONCE = 4096
"""Of pictures that are made together: a picture of a megapixel, or 64 of 128 x 128."""


class PictureFeatures:
    """Features by content.

    Args:
        budget_bytes: of what is kept on the model's device; 0 keeps nothing.
        alone: every picture by itself, so that its sums do not depend on others.
    """

    def __init__(
        self, adapter: Adapter, model: Any, budget_bytes: int, device: torch.device, alone: bool = False
    ) -> None:
        self.adapter, self.model, self.budget_bytes = adapter, model, budget_bytes
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self.held_bytes = 0
        self.num_made = 0
        self.device = device
        self._recorded = RecordedPictures(device, self._of_one) if device.type == "cuda" else None
        self._patches_at_once = 1 if alone else PATCHES_AT_ONCE

    @torch.inference_mode()
    def of(self, images: Sequence[EngineImage]) -> Features:
        """Of pictures in order, end to end; at least one."""
        keys = [image.digest or pixels_digest(image.grid, image.pixels) for image in images]
        missing: dict[bytes, EngineImage] = {}
        for key, image in zip(keys, images, strict=True):
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                missing.setdefault(key, image)
        fresh = dict(zip(missing, self._make(list(missing.values())), strict=True))
        found = [fresh.get(key) or self._kept[key] for key in keys]
        for key, features in fresh.items():
            self._keep(key, features)
        layers = zip(*(features.deepstack for features in found), strict=True)
        return Features(torch.cat([features.embeds for features in found]), tuple(torch.cat(layer) for layer in layers))

    def _make(self, images: list[EngineImage]) -> list[Features]:
        self.num_made += len(images)
        if self._recorded is not None:
            return [self._recorded(upload(image.pixels, self.device), image.grid) for image in images]
        made: list[Features] = []
        while len(made) < len(images):
            ends = itertools.accumulate(math.prod(image.grid) for image in images[len(made) :])
            count = max(1, sum(end <= self._patches_at_once for end in ends))
            made += self._together(images[len(made) : len(made) + count])
        return made

    def _together(self, images: Sequence[EngineImage]) -> list[Features]:
        grids = [image.grid for image in images]
        whole = self._of([upload(image.pixels, self.device) for image in images], grids)
        parts = whole.split([self.adapter.num_visual_tokens(self.model.config, grid) for grid in grids])
        # A part of the whole would keep all of it alive.
        return parts if len(parts) == 1 else [part.clone() for part in parts]

    def _of(self, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> Features:
        embeds, deepstack = self.adapter.merge(self.model, self.adapter.tower(self.model, pixels, grids))
        assert embeds is not None
        return Features(embeds, tuple(deepstack))

    def _of_one(self, pixels: torch.Tensor, grid: Grid) -> Features:
        return self._of([pixels], [grid])

    def _keep(self, key: bytes, features: Features) -> None:
        size = _num_bytes(features)
        if size > self.budget_bytes:
            return
        while self.held_bytes + size > self.budget_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.held_bytes -= _num_bytes(dropped)
        self._kept[key] = features
        self.held_bytes += size


def _num_bytes(features: Features) -> int:
    return sum(tensor.nbytes for tensor in (features.embeds, *features.deepstack))
