"""The part ``emoji`` of the mix."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from grace_vlm.data.sources.world import emoji_questions, emoji_scenes
from grace_vlm.data.sources.world.drawn import Drawn, about, ask
from grace_vlm.data.sources.world.emoji import read_catalogue
from grace_vlm.data.sources.world.emoji_questions import Shown

NUM_QUESTIONS = 6


class EmojiSource:
    """Pictures composed of emoji (``drawn.Source``)."""

    rows_per_unit: ClassVar[Mapping[str, float]] = {"train": 5.9, "test": 5.9, "unseen": 3.2}

    def __init__(self, folder: Path, seed: int) -> None:
        self._seed = seed
        self._catalogue = read_catalogue(folder, seed)
        self._dealers = {split: emoji_scenes.Dealer(self._catalogue, split) for split in ("train", "test", "unseen")}

    def unit(self, split: str, number: int) -> list[Drawn]:
        """One picture with up to six questions."""
        rng = random.Random(f"{self._seed}/world/emoji/{split}/{number}")
        dealer = self._dealers[split]
        scene = emoji_scenes.compose(rng, dealer)
        shown = Shown(scene, dealer)
        questions = ask(rng, shown, emoji_questions.KINDS[scene.layout], NUM_QUESTIONS)
        if split == "unseen" and scene.layout != "single":
            questions = about(questions, self._catalogue.held_out & set(scene.names()))
        caption = emoji_questions.describe(shown)
        caption = caption[0].upper() + caption[1:]
        return [Drawn((emoji_scenes.draw(scene, self._catalogue),), ".jpg", tuple(questions), caption)]
