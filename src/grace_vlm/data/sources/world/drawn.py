"""What every part of the mix hands over: pictures with their questions, and how a question gets its form.

A kind of question is a function of a scene that gives one ``Asked`` or none. A question with wrong options becomes a
choice now and then, in one of the two forms in which ``grace eval`` asks for letters (lmms-eval's and the card's).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from grace_vlm.data.sources.questions import CHOICE_REQUEST, Question

SIDE_PX = 192
"""What our own pictures are drawn at: the model of the mix sees every picture at this size."""
SPLITS = ("train", "test", "unseen")
"""``unseen`` are test pictures that show something which no training picture shows or names."""
CHOICE_FRACTION = 0.3
CARD_REQUEST = "Answer with only the option letter."

Scene = TypeVar("Scene")


@dataclass(frozen=True)
class Drawn:
    """Pictures that are asked about together, mostly one.

    Args:
        images: the files' bytes. suffix: of their names, ``.jpg`` or ``.png``.
        questions: where a text has ``<image>`` markers, it has one a picture; without any, pictures come first.
        caption: empty where there is none.
    """

    images: tuple[bytes, ...]
    suffix: str
    questions: tuple[Question, ...]
    caption: str


class Source(Protocol):
    """A part of the mix. A unit is what is drawn in one go, from a generator of its own: mostly one picture."""

    def unit(self, split: str, number: int) -> list[Drawn]: ...


@dataclass(frozen=True)
class Asked:
    """One question that could be asked: ``wrong`` are other answers of its sort, the nearest first or in any order."""

    text: str
    answer: str
    wrong: tuple[str, ...] = ()


Kind = Callable[[random.Random, Scene], Asked | None]


def ask(rng: random.Random, scene: Scene, kinds: Mapping[str, Kind[Scene]], num_questions: int) -> list[Question]:
    """Up to ``num_questions`` different questions, going round the kinds in random order."""
    order = rng.sample(sorted(kinds), len(kinds))
    found: dict[str, Question] = {}
    for turn in range(2 * max(num_questions, len(order))):
        if len(found) == num_questions:
            break
        kind = order[turn % len(order)]
        asked = kinds[kind](rng, scene)
        if asked is not None and asked.text not in found:
            found[asked.text] = phrase(rng, kind, asked)
    return list(found.values())


def phrase(rng: random.Random, kind: str, asked: Asked) -> Question:
    """The question in its form: yes or no, a choice of three or four, or open."""
    if asked.answer in ("yes", "no"):
        return Question(kind, "yes_no", asked.text, asked.answer)
    wrong = [text for text in dict.fromkeys(asked.wrong) if text != asked.answer]
    if len(wrong) < 2 or rng.random() >= CHOICE_FRACTION:
        return Question(kind, "open", asked.text, asked.answer)
    options = [asked.answer, *rng.sample(wrong, min(len(wrong), rng.choice((2, 3, 3))))]
    rng.shuffle(options)
    return Question(kind, "choice", choice_text(rng, asked.text, options), "ABCD"[options.index(asked.answer)])


def choice_text(rng: random.Random, text: str, options: Sequence[str]) -> str:
    """The question with its options, as lmms-eval writes them or as the card's scripts do."""
    pairs = list(zip("ABCD", options, strict=False))
    if rng.random() < 0.5:
        return "\n".join([text, *(f"{letter}. {option}" for letter, option in pairs), CHOICE_REQUEST])
    listed = "\n".join(f"({letter}) {option}" for letter, option in pairs)
    return f"Question: {text}\nOptions:\n{listed}\n{CARD_REQUEST}"


def said(is_so: bool) -> str:
    """``yes`` or ``no``."""
    return "yes" if is_so else "no"


def about(questions: Sequence[Question], names: Collection[str]) -> list[Question]:
    """The questions that name one of ``names``, in their text or their answer."""
    listed = "|".join(re.escape(name) for name in sorted(names)) or r"(?!)"
    pattern = re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE)
    return [one for one in questions if pattern.search(f"{one.text}\n{one.answer}")]
