"""The part ``scenes`` of the mix: the generated pictures that the demo's bases are trained on, of other seeds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from grace_vlm.data.sources import easy_vqa, scenes
from grace_vlm.data.sources.world.drawn import Drawn


class ScenesSource:
    """Grids, mosaics, charts, digits and diagrams of ``scenes`` (``drawn.Source``)."""

    rows_per_unit: ClassVar[Mapping[str, float]] = {"train": 6.0, "test": 6.0}

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tiles = easy_vqa.read_tiles(seed)

    def unit(self, split: str, number: int) -> list[Drawn]:
        """One picture with six questions."""
        rng = random.Random(f"{self._seed}/world/scenes/{split}/{number}")
        room, scene, png, questions = scenes.make_scene(rng, number, self._tiles[split])
        return [Drawn((png,), ".png", tuple(questions), f"{room.describe(scene)}.")]
