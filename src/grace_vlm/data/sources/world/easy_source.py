"""The part ``easy`` of the mix: easy-VQA's pictures with its own questions, and four of them as a mosaic.

The package's 1,000 test pictures are for tests alone, and so are mosaics of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from grace_vlm.data.sources import easy_vqa, grids
from grace_vlm.data.sources.easy_vqa import DEFAULT_SIZES
from grace_vlm.data.sources.questions import AskedPicture, Question, wrong_answers
from grace_vlm.data.sources.world.drawn import Asked, Drawn, Kind, ask, phrase
from grace_vlm.data.sources.world.emoji_questions import PLACES_2
from grace_vlm.media.canvas import COLORS

NUM_QUESTIONS = 6
NUM_YES_NO = 2
"""Of each truth, about one of easy-VQA's own pictures."""
SINGLE_EVERY = 3
"""Of the pictures one in so many is one of easy-VQA's own, the others are mosaics."""


class EasySource:
    """easy-VQA's pictures and mosaics of them (``drawn.Source``)."""

    rows_per_unit: ClassVar[Mapping[str, float]] = {"train": 5.6, "test": 5.6}

    def __init__(self, seed: int) -> None:
        self._seed = seed
        tiles = easy_vqa.read_tiles(seed)
        self._tiles = {"train": tiles["train"], "test": tiles["test"]}
        singles: dict[str, list[AskedPicture]] = {"train": [], "val": [], "test": []}
        for picture in easy_vqa.pictures(seed, DEFAULT_SIZES):
            singles[picture.split].append(picture)
        self._singles = {
            split: random.Random(f"{seed}/world/easy/{split}").sample(found, len(found))
            for split, found in singles.items()
        }

    def unit(self, split: str, number: int) -> list[Drawn]:
        """One picture with up to six questions; nothing where the package has no further picture."""
        rng = random.Random(f"{self._seed}/world/easy/{split}/{number}")
        place, is_mosaic = divmod(number, SINGLE_EVERY)
        if not is_mosaic and place < len(self._singles[split]):
            return [_single(rng, self._singles[split][place])]
        scene = grids.compose_mosaic(rng, self._tiles[split])
        questions = ask(rng, scene, KINDS, NUM_QUESTIONS)
        return [Drawn((grids.draw(scene),), ".png", tuple(questions), f"{grids.describe(scene)}.")]


def _single(rng: random.Random, picture: AskedPicture) -> Drawn:
    """Its open questions, and of its yes/no questions as many whose words are true of the picture as not: of the
    package's own most are not."""
    chosen = [one for one in picture.questions if one.form == "open"]
    said: dict[bool, list[Question]] = {True: [], False: []}
    for one in picture.questions:
        if one.form == "yes_no":
            said[(one.answer == "yes") != easy_vqa.is_negated(one.text)].append(one)
    number = min(NUM_YES_NO, len(said[True]), len(said[False]))
    chosen += [*rng.sample(said[True], number), *rng.sample(said[False], number)]
    questions = [phrase(rng, one.kind, Asked(one.text, one.answer, tuple(wrong_answers(one.answer)))) for one in chosen]
    return Drawn((picture.png,), ".png", tuple(rng.sample(questions, len(questions))), f"{picture.caption}.")


def _in_corner(rng: random.Random, scene: grids.Grid) -> Asked:
    (row, column), words = rng.choice(list(PLACES_2.items()))
    cell = scene.cells[row][column]
    assert cell is not None
    if rng.random() < 0.5:
        return Asked(f"what color is the shape in the {words}?", cell.color, tuple(wrong_answers(cell.color)))
    return Asked(f"what shape is in the {words}?", cell.shape, tuple(wrong_answers(cell.shape)))


def _where(rng: random.Random, scene: grids.Grid) -> Asked | None:
    places = scene.unique()
    if not places:
        return None
    name = rng.choice(sorted(places))
    return Asked(f"where is the {name}?", PLACES_2[places[name]], tuple(PLACES_2.values()))


def _exists(rng: random.Random, scene: grids.Grid) -> Asked:
    """What is not there has a shape that is, as often as what is there has it: or the rarer shape would be a no."""
    cells = [cell for _, _, cell in scene.filled()]
    cell, names = rng.choice(cells), {cell.name for cell in cells}
    if rng.random() < 0.5:
        return Asked(f"is there a {cell.name}?", "yes")
    near = {other.color for other in cells if f"{other.color} {cell.shape}" not in names}
    far = {color for color in COLORS if f"{color} {cell.shape}" not in names}
    return Asked(f"is there a {rng.choice(sorted(near or far))} {cell.shape}?", "no")


def _of_grids(kind: str) -> Kind[grids.Grid]:
    """A kind of ``grids``: first an answer, then a candidate, as ``questions.pick`` does."""

    def asked(rng: random.Random, scene: grids.Grid) -> Asked | None:
        candidates = grids.KINDS[kind](scene)
        answers = {answer for _, answer in candidates}
        if not answers or answers in ({"yes"}, {"no"}):
            return None
        answer = rng.choice(sorted(answers))
        text = rng.choice([text for text, other in candidates if other == answer])
        return Asked(text, answer, tuple(wrong_answers(answer)))

    return asked


KINDS: dict[str, Kind[grids.Grid]] = {
    "mosaic_in_corner": _in_corner,
    "mosaic_where": _where,
    "mosaic_exists": _exists,
    **{
        kind.replace("scene", "mosaic"): _of_grids(kind)
        for kind in ("scene_relation", "scene_count_shape", "scene_neighbor")
    },
}
