"""Compositions of emoji: one, two side by side, mosaics of 2 x 2 and 3 x 3, and a few scattered kinds to be counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from grace_vlm.data.sources.world.drawn import SIDE_PX
from grace_vlm.data.sources.world.emoji import Catalogue, Emoji
from grace_vlm.data.sources.world.emoji_words import GROUPS
from grace_vlm.data.sources.world.grounds import choose_ground, read_cutout
from grace_vlm.media.collage import Collage, Ground, Pasted

LAYOUTS = {"single": 10, "pair": 3, "mosaic_2": 5, "mosaic_3": 3, "odd": 2, "scatter": 5}
"""Layout -> how often, relative to the others. ``odd`` is a mosaic in which one thing is of another sort."""
_SIDES = {"pair": (1, 2), "mosaic_2": (2, 2), "mosaic_3": (3, 3), "odd": (2, 2), "scatter": (4, 4), "single": (1, 1)}
MAX_TILT = 14.0


@dataclass(frozen=True)
class EmojiScene:
    """What is where. ``cells[row][column]``: a name or None; ``drawn``: (name, number of its picture, how) in order."""

    layout: str
    ground: Ground
    ground_color: str | None
    cells: tuple[tuple[str | None, ...], ...]
    drawn: tuple[tuple[str, int, Pasted], ...]

    def names(self) -> list[str]:
        """Of all things, row by row; one that stands twice is there twice."""
        return [name for row in self.cells for name in row if name is not None]


class Dealer:
    """Draws things for scenes of one split."""

    def __init__(self, catalogue: Catalogue, split: str) -> None:
        self.things = catalogue.things
        self._common = _by_group(catalogue, catalogue.names(is_held_out=False))
        self._unseen = _by_group(catalogue, catalogue.names(is_held_out=True))
        self.is_unseen = split == "unseen"

    def one(self, rng: random.Random, is_unseen: bool | None = None) -> Emoji:
        """A thing: first its sort, then the thing."""
        groups = self._unseen if (self.is_unseen if is_unseen is None else is_unseen) else self._common
        group = rng.choices(list(groups), [GROUPS[name][1] for name in groups])[0]
        return self.things[rng.choice(groups[group])]

    def others(self, name: str, same_group: bool) -> list[str]:
        """Other names, for wrong answers: those that the model was trained on, or of what it was not."""
        mine = self._side_of(name)
        group = self.things[name].group
        found = [other for key, members in mine.items() if (key == group) == same_group for other in members]
        return [other for other in found if other != name]

    def several(self, rng: random.Random, count: int) -> list[Emoji]:
        """Different things; of ``unseen``, the first of which is one that training never shows."""
        found = {(first := self.one(rng)).name: first}
        while len(found) < count:
            thing = self.one(rng, is_unseen=False)
            found.setdefault(thing.name, thing)
        things = list(found.values())
        rng.shuffle(things)
        return things

    def pair(self, rng: random.Random) -> list[Emoji]:
        """Two things, half of the time of one sort."""
        first = self.one(rng)
        alike = [name for name in self._common.get(first.group, []) if name != first.name]
        while True:
            second = self.things[rng.choice(alike)] if alike and rng.random() < 0.45 else self.one(rng, is_unseen=False)
            if second.name != first.name:
                return rng.sample([first, second], 2)

    def odd(self, rng: random.Random, count: int) -> list[Emoji]:
        """``count`` - 1 things of one sort and one of another."""
        groups = [name for name, members in self._common.items() if len(members) >= count and name != "other"]
        first = self.one(rng)
        while first.group == "other":
            first = self.one(rng)
        sort = rng.choice([name for name in groups if name != first.group])
        things = [first, *(self.things[name] for name in rng.sample(self._common[sort], count - 1))]
        rng.shuffle(things)
        return things

    def _side_of(self, name: str) -> dict[str, list[str]]:
        return self._unseen if any(name in members for members in self._unseen.values()) else self._common


def compose(rng: random.Random, dealer: Dealer) -> EmojiScene:
    """A scene of a layout drawn by ``LAYOUTS``."""
    layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    rows, columns = _SIDES[layout]
    ground, color = choose_ground(rng)
    if layout == "scatter":
        placed = _scattered(rng, dealer)
    elif layout == "pair":
        placed = dict(zip(_places(rows, columns), dealer.pair(rng), strict=True))
    elif layout == "odd":
        placed = dict(zip(_places(rows, columns), dealer.odd(rng, 4), strict=True))
    else:
        placed = dict(zip(_places(rows, columns), dealer.several(rng, rows * columns), strict=True))
    cell_px = SIDE_PX / columns
    drawn = tuple(
        (thing.name, rng.randrange(len(thing.pictures)), _how(rng, row, column, rows, cell_px))
        for (row, column), thing in placed.items()
    )
    cells = tuple(
        tuple(placed[row, column].name if (row, column) in placed else None for column in range(columns))
        for row in range(rows)
    )
    return EmojiScene(layout, ground, color, cells, drawn)


def draw(scene: EmojiScene, things: Catalogue) -> bytes:
    """The scene as a JPEG of 192 x 192 pixels."""
    collage = Collage(SIDE_PX, scene.ground)
    for name, number, how in scene.drawn:
        collage.paste(read_cutout(things.things[name].pictures[number]), how)
    return collage.jpeg()


def _by_group(catalogue: Catalogue, names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in names:
        found[catalogue.things[name].group].append(name)
    return {group: members for group, members in found.items() if members}


def _places(rows: int, columns: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(rows) for column in range(columns)]


def _scattered(rng: random.Random, dealer: Dealer) -> dict[tuple[int, int], Emoji]:
    """Two or three kinds of things, one to five of each, on a grid of 4 x 4 places."""
    things = dealer.several(rng, rng.choice((2, 2, 3)))
    crowd = [thing for thing in things for _ in range(rng.randint(1, 5))]
    places = rng.sample(_places(4, 4), len(crowd))
    return dict(sorted(zip(places, crowd, strict=True), key=lambda pair: pair[0]))


def _how(rng: random.Random, row: int, column: int, rows: int, cell_px: float) -> Pasted:
    """Somewhere in its cell, which is as high as the picture where there is one row."""
    side = round(cell_px * rng.uniform(0.62, 0.92))
    high = SIDE_PX / rows
    slack_x, slack_y = (cell_px - side) / 2, min((high - side) / 2, cell_px / 2)
    center = (
        (column + 0.5) * cell_px + rng.uniform(-slack_x, slack_x),
        (row + 0.5) * high + rng.uniform(-slack_y, slack_y),
    )
    angle = round(rng.uniform(-MAX_TILT, MAX_TILT), 1) if rng.random() < 0.4 else 0.0
    return Pasted((round(center[0], 1), round(center[1], 1)), side, angle)
