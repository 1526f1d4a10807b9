"""The part ``tables`` of the mix: charts of the real figures of ``vega-datasets``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from grace_vlm.data.sources.world import figures
from grace_vlm.data.sources.world.drawn import Drawn, ask
from grace_vlm.data.sources.world.series import read_series

NUM_QUESTIONS = 6


class TablesSource:
    """Pictures of charts and tables (``drawn.Source``)."""

    rows_per_unit: ClassVar[Mapping[str, float]] = {"train": 6.0, "test": 6.0}

    def __init__(self, folder: Path, seed: int) -> None:
        self._seed = seed
        self._listing = read_series(folder)

    def unit(self, split: str, number: int) -> list[Drawn]:
        """One picture with up to six questions."""
        rng = random.Random(f"{self._seed}/world/tables/{split}/{number}")
        figure = figures.compose(rng, self._listing)
        questions = ask(rng, figure, figures.KINDS, NUM_QUESTIONS)
        return [Drawn((figures.draw(figure),), ".png", tuple(questions), figures.describe(figure))]
