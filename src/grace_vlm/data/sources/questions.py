"""How a drawn scene is asked about: every kind lists all it could ask, one rule picks.

A kind of question is a function from a scene to ALL its candidates, pairs (text, answer). The pick is balanced: first
an answer among those that the scene allows, uniformly, then a candidate with that answer. A yes/no kind is asked only
where both answers are possible, so neither "no" nor "0" can be learnt from the wording, and a test can check every
candidate and not only the asked ones. One open question in four becomes a choice, in the wording of LLaVA.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from grace_vlm.media.canvas import COLORS, SHAPES

Scene = TypeVar("Scene")
Candidate = tuple[str, str]
Kinds = Mapping[str, Callable[[Scene], list[Candidate]]]

NUM_QUESTIONS = 6
NUM_MORE_QUESTIONS = 20
"""Of a training picture, for the second stage of training."""
CHOICE_FRACTION = 0.25
CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question, its answer, its kind (what it asks) and its form (``open``, ``yes_no`` or ``choice``)."""

    kind: str
    form: str
    text: str
    answer: str


@dataclass(frozen=True)
class AskedPicture:
    """One picture of a prepared set: its split, its file name without folder, its PNG bytes, its questions, a
    caption that tells all there is to see (empty where nobody knows), and more questions if it is trained on."""

    split: str
    name: str
    png: bytes
    questions: tuple[Question, ...]
    caption: str
    more_questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Pictures in each split."""

    num_train_images: int
    num_val_images: int
    num_test_images: int

    def items(self) -> list[tuple[str, int]]:
        """(split, number of pictures), in the order in which they are made."""
        return [("train", self.num_train_images), ("val", self.num_val_images), ("test", self.num_test_images)]


def ask(rng: random.Random, scene: Scene, kinds: Kinds[Scene], num_questions: int = NUM_QUESTIONS) -> list[Question]:
    """Up to ``num_questions`` different questions about ``scene``, going round the kinds in random order."""
    pool = {kind: candidates for kind, listing in kinds.items() if _is_fair(candidates := listing(scene))}
    order = rng.sample(sorted(pool), len(pool))
    asked: dict[str, Question] = {}
    for turn in range(4 * num_questions):
        if len(asked) == num_questions or not order:
            break
        kind = order[turn % len(order)]
        text, answer = pick(rng, pool[kind])
        if text not in asked:
            asked[text] = _phrase(rng, kind, text, answer)
    return list(asked.values())


def _is_fair(candidates: Sequence[Candidate]) -> bool:
    answers = {answer for _, answer in candidates}
    return bool(answers) and answers not in ({"yes"}, {"no"})


def pick(rng: random.Random, candidates: Sequence[Candidate]) -> Candidate:
    """First an answer, uniformly, then a candidate with that answer."""
    answer = rng.choice(sorted({answer for _, answer in candidates}))
    return rng.choice([candidate for candidate in candidates if candidate[1] == answer])


def _phrase(rng: random.Random, kind: str, text: str, answer: str) -> Question:
    if answer in ("yes", "no"):
        return Question(kind, "yes_no", text, answer)
    wrong = wrong_answers(answer)
    if not wrong or rng.random() >= CHOICE_FRACTION:
        return Question(kind, "open", text, answer)
    options = [answer, *rng.sample(wrong, min(len(wrong), rng.choice((2, 3))))]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    return Question(kind, "choice", "\n".join([text, *lines, CHOICE_REQUEST]), "ABCD"[options.index(answer)])


def wrong_answers(answer: str) -> list[str]:
    """Plausible other answers; none for the letter of a node, which would read like an option's letter."""
    for words in (tuple(COLORS), SHAPES):
        if answer in words:
            return [word for word in words if word != answer]
    if answer.isdigit():
        return [str(value) for value in range(max(0, int(answer) - 3), int(answer) + 4) if value != int(answer)]
    return []
