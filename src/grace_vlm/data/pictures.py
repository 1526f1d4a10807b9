"""Pictures of a data set as patch tensors, each decoded at most once while it fits the budget."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grace_vlm.data.row_key import pixels_digest
from grace_vlm.errors import ConfigError
from grace_vlm.media.image import LoadedImage
from grace_vlm.models.adapter import Adapter, Grid


@dataclass(frozen=True)
class Picture:
    """One picture of a batch.

    Args:
        key: its name in the data set; caches are keyed by it.
        grid: (t, h, w) in patches.
        pixels: what the tower takes, (n_patches, patch_dim) or (3, H, W); None where its output is
            already kept.
        digest: ``pixels_digest`` of the pixels, also where they are None; None where nobody asked for it.
    """

    key: str
    grid: Grid
    pixels: torch.Tensor | None
    digest: bytes | None = None


Patchify = Callable[[Sequence[Any]], list[tuple[Grid, torch.Tensor]]]
"""Decoded pictures -> (grid, pixels) each: ``Adapter.patchify`` with its image processor and configuration."""


class PictureStore:
    """Patchifies pictures with a model's own image processor; keeps patches up to ``budget_bytes``, grids for ever.

    Args:
        patchify: see ``patchify_of``.
        device: where kept patches live (default: the host); the tower wants them there.
        dtype: what pixels are cast to, the tower's dtype: BF16 halves what workers hand over.
        with_digests: hash every picture where it is made (in a worker, if there are any): a millisecond or two each.
    """

    def __init__(
        self,
        patchify: Patchify,
        budget_bytes: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        with_digests: bool = False,
    ) -> None:
        self.patchify, self.budget_bytes, self.device, self.dtype = patchify, budget_bytes, device, dtype
        self.with_digests = with_digests
        self._digests: dict[str, bytes] = {}
        self._grids: dict[str, Grid] = {}
        self._pixels: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._held_bytes = 0

    def find(self, name: str, with_pixels: bool = True) -> Picture | None:
        """The picture if what is asked for is here, else None: decode it and ``add`` it."""
        if name not in self._grids or (with_pixels and name not in self._pixels):
            return None
        pixels = self._pixels[name] if with_pixels else None
        return Picture(name, self._grids[name], pixels, self._digests.get(name))

    def add(self, name: str, loaded: LoadedImage) -> Picture:
        """Patchify a decoded picture; the oldest patches leave when the budget is full."""
        return self.add_many([(name, loaded)])[0]

    def add_many(self, decoded: Sequence[tuple[str, LoadedImage]]) -> list[Picture]:
        """``add`` for several: one call of the processor, which stacks pictures of one size."""
        made = self.patchify([loaded.image for _, loaded in decoded])
        return [
            self._keep(name, g, pixels.to(self.dtype)) for (name, _), (g, pixels) in zip(decoded, made, strict=True)
        ]

    def _keep(self, name: str, grid: Grid, pixels: torch.Tensor) -> Picture:
        if self.with_digests:
            self._digests[name] = pixels_digest(grid, pixels)
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
        return Picture(name, grid, pixels, self._digests.get(name))


def largest_area(processor: Any) -> int | None:
    """Pixels that a picture has at most after resizing; None for a processor that resizes to a fixed size."""
    image_processor = processor.image_processor
    size = dict(image_processor.size)
    if {"shortest_edge", "longest_edge"} <= size.keys() and hasattr(image_processor, "merge_size"):
        return int(size["longest_edge"])
    return None


def patchify_of(
    adapter: Adapter, config: Any, processor: Any, min_pixels: int | None = None, max_pixels: int | None = None
) -> Patchify:
    """How a model's pictures are made, with limits on their area in pixels; the processor itself is left as it is.

    Raises:
        ConfigError: a limit for a processor of fixed size, or limits that exclude every picture.
    """
    image_processor = processor.image_processor
    if min_pixels is not None or max_pixels is not None:
        size = dict(image_processor.size)
        if largest_area(processor) is None:
            raise ConfigError(
                f"data.min_pixels and data.max_pixels (--max-pixels) are for processors that resize to an area; "
                f"{type(image_processor).__name__} has size {size}; leave them out"
            )
        # Transformers' names, kept for history: both are areas in pixels here.
        size["shortest_edge"] = size["shortest_edge"] if min_pixels is None else min_pixels
        size["longest_edge"] = size["longest_edge"] if max_pixels is None else max_pixels
        if max_pixels is not None and min_pixels is None:
            size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
        if size["shortest_edge"] > size["longest_edge"]:
            raise ConfigError(
                f"data.min_pixels is {size['shortest_edge']} and data.max_pixels {size['longest_edge']}; "
                "the least area must not be above the largest"
            )
        image_processor = copy.deepcopy(image_processor)
        image_processor.size = type(image_processor.size)(**size)
    return functools.partial(adapter.patchify, config, image_processor)
