"""Choice questions about drawn scenes: the answer is the scene's, the other options are of the same sort.

An item is drawn from ``seed/toy-suite/benchmark/number/attempt``, so item 17 of a benchmark depends on nothing else.
It is drawn again while its scene has nothing to ask, or if the same picture was asked the same before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.questions import Candidate, pick
from grace_vlm.evals.toy.rooms import ROOMS, Room, Scene

LETTERS = "ABCDEFGH"
MAX_ATTEMPTS = 10_000


@dataclass(frozen=True)
class Item:
    """One question. ``answer`` is an index into ``options``; ``facts`` tells the picture in words."""

    kind: str
    question: str
    options: tuple[str, ...]
    answer: int
    png: bytes
    facts: str

    @property
    def letter(self) -> str:
        """Of the right option."""
        return LETTERS[self.answer]

    @property
    def text(self) -> str:
        """The right option."""
        return self.options[self.answer]


class Deck:
    """The items of one benchmark, one after the other."""

    def __init__(self, benchmark: str, seed: int) -> None:
        self._name = f"{seed}/toy-suite/{benchmark}"
        self._seen: set[tuple[str, bytes | str]] = set()
        self._num_dealt = 0

    def rng(self, use: str) -> random.Random:
        """A generator for what is not an item."""
        return random.Random(f"{self._name}/{use}")

    def deal(self, room_name: str, kind: str, num_options: int, *, by_facts: bool = False) -> Item:
        """The next item: ``kind`` of question about a scene of ``room_name``.

        ``by_facts``: what must not repeat is the question with its facts, for items that show no picture.
        """
        room, number = ROOMS[room_name], self._num_dealt
        self._num_dealt += 1
        for attempt in range(MAX_ATTEMPTS):
            rng = random.Random(f"{self._name}/{number}/{attempt}")
            scene = room.compose(rng)
            candidates = room.kinds[kind](scene)
            if not candidates:
                continue
            item = make_item(rng, room, kind, scene, pick(rng, candidates), num_options)
            key = (item.question, item.facts if by_facts else item.png)
            if key not in self._seen:
                self._seen.add(key)
                return item
        raise AssertionError(f"{room_name} has no more {kind} to ask")


def make_item(rng: random.Random, room: Room, kind: str, scene: Scene, candidate: Candidate, num_options: int) -> Item:
    """A candidate with ``num_options`` options in random order."""
    question, answer = candidate
    wrong, facts = room.wrong(kind, answer), room.describe(scene)
    assert len(wrong) >= num_options - 1, (kind, answer)
    rng.shuffle(wrong)
    if room.offers_shown:
        wrong.sort(key=lambda word: word not in facts)
    options = [answer, *wrong[: num_options - 1]]
    rng.shuffle(options)
    return Item(kind, question, tuple(options), options.index(answer), room.draw(scene), facts)
