"""What the decoder is given of pictures: made once a picture, kept by the picture's content.

Tower and merger run for every picture that is not kept. What is kept is found by SHA-256 of grid and pixels, all 256
bits of it, so that two pictures are never taken for one; the picture that was asked for longest ago leaves first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from grace_vlm.data.row_key import pixels_digest
from grace_vlm.engine.recorded import RecordedPictures
from grace_vlm.engine.request import EngineImage, Features
from grace_vlm.kernels.upload import upload
from grace_vlm.models.adapter import Adapter, Grid


class PictureFeatures:
    """Features by content.

    Args:
        budget_bytes: of what is kept on the model's device; 0 keeps nothing.
    """

    def __init__(self, adapter: Adapter, model: Any, budget_bytes: int, device: torch.device) -> None:
        self.adapter, self.model, self.budget_bytes = adapter, model, budget_bytes
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self.held_bytes = 0
        self.num_made = 0
        self.device = device
        self._features = RecordedPictures(device, self._of) if device.type == "cuda" else self._of

    @torch.inference_mode()
    def of(self, images: Sequence[EngineImage]) -> Features:
        """Of the pictures of one request, in order, end to end; at least one."""
        keys = [pixels_digest(image.grid, image.pixels) for image in images]
        fresh: dict[bytes, Features] = {}
        for key, image in zip(keys, images, strict=True):
            if key in self._kept:
                self._kept.move_to_end(key)
            elif key not in fresh:
                fresh[key] = self._make(image)
        found = [fresh.get(key) or self._kept[key] for key in keys]
        for key, features in fresh.items():
            self._keep(key, features)
        layers = zip(*(features.deepstack for features in found), strict=True)
        return Features(torch.cat([features.embeds for features in found]), tuple(torch.cat(layer) for layer in layers))

    def _make(self, image: EngineImage) -> Features:
        self.num_made += 1
        return self._features(upload(image.pixels, self.device), image.grid)

    def _of(self, pixels: torch.Tensor, grid: Grid) -> Features:
        embeds, deepstack = self.adapter.merge(self.model, self.adapter.tower(self.model, [pixels], [grid]))
        assert embeds is not None
        return Features(embeds, tuple(deepstack))

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
