"""Stand-ins for models: what they answer follows from the gold, so what they score is known beforehand.

A responder is a function of a question's gold, its options and its key (any text that names the question):

    gold      the letter of the right option, or the text of the right answer where there are no letters
    options   the options' texts in order; ("yes", "no") of a yes/no question; empty of an open one
    key       only ``random`` looks at it

An oracle that writes in another form than a bare letter tests extraction: every form says the gold plainly, and what a
profile's parser makes of it is the parser's merit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from grace_vlm.evals.toy.deck import LETTERS

Responder = Callable[[str, Sequence[str], str], str]


def is_letter(gold: str, options: Sequence[str]) -> bool:
    """Whether the gold is a letter that stands for one of the options, even if those are letters too."""
    return len(gold) == 1 and gold in LETTERS[: len(options)]


def replies(gold: str, options: Sequence[str]) -> list[str]:
    """All that could be answered: letters, or the options themselves."""
    return list(LETTERS[: len(options)]) if is_letter(gold, options) else list(options)


def gold_text(gold: str, options: Sequence[str]) -> str:
    """The words of the right answer: a letter's option, or the gold itself."""
    return options[LETTERS.index(gold)] if is_letter(gold, options) else gold


def oracle(gold: str, options: Sequence[str], key: str) -> str:
    """Always right, in the form that was asked for."""
    return gold


def constant(reply: str) -> Responder:
    """Always the same, whatever the question: a letter, ``yes``, ``0``."""
    return lambda gold, options, key: reply


def uniform(seed: int) -> Responder:
    """Any of the possible replies, drawn from the seed and the key alone: order and batches change nothing. An open
    question, which has no possible replies to draw from, is answered with an empty text."""

    def respond(gold: str, options: Sequence[str], key: str) -> str:
        possible = replies(gold, options)
        return random.Random(f"{seed}/{key}").choice(possible) if possible else ""

    return respond


def blind(gold: str, options: Sequence[str], key: str) -> str:
    """What can be said without a picture: the longest option, the first of those; the gold decides nothing but whether
    letters are asked for. An open question is answered with an empty text."""
    possible = replies(gold, options)
    return max(zip(possible, options, strict=True), key=lambda pair: len(pair[1]))[0] if possible else ""


def always_wrong(gold: str, options: Sequence[str], key: str) -> str:
    """The reply after the right one: no point for anybody."""
    possible = replies(gold, options)
    return possible[(possible.index(gold) + 1) % len(possible)] if possible else f"not {gold}"


def in_parentheses(gold: str, options: Sequence[str], key: str) -> str:
    """``(C)``"""
    return f"({gold})"


def in_bold(gold: str, options: Sequence[str], key: str) -> str:
    """``**C**``"""
    return f"**{gold}**"


def with_text(gold: str, options: Sequence[str], key: str) -> str:
    """``C. a green cone``; without letters the answer and a full stop."""
    return f"{gold}. {gold_text(gold, options)}" if is_letter(gold, options) else f"{gold}."


def announced(gold: str, options: Sequence[str], key: str) -> str:
    """``Answer: C``"""
    return f"Answer: {gold}"


def in_prose(gold: str, options: Sequence[str], key: str) -> str:
    """``A green cone is shown, so C``: the article looks like a letter. Without letters ``The answer is no``."""
    if not is_letter(gold, options):
        return f"The answer is {gold}"
    return f"A {gold_text(gold, options).removeprefix('a ')} is shown, so {gold}"


def text_only(gold: str, options: Sequence[str], key: str) -> str:
    """``a green cone``: the right option's words and no letter."""
    return gold_text(gold, options)


def by_exclusion(gold: str, options: Sequence[str], key: str) -> str:
    """``It is not A, so C``: names a wrong reply first."""
    wrong = [reply for reply in replies(gold, options) if reply != gold]
    return f"It is not {wrong[0]}, so {gold}" if wrong else f"It is {gold}"


def in_lower_case(gold: str, options: Sequence[str], key: str) -> str:
    """``c``"""
    return gold.lower()


FORMATTED_ORACLES: Mapping[str, Responder] = {
    "parentheses": in_parentheses,
    "bold": in_bold,
    "with_text": with_text,
    "announced": announced,
    "prose": in_prose,
    "text_only": text_only,
    "exclusion": by_exclusion,
    "lower_case": in_lower_case,
}
"""The oracle in the forms that users' models were seen to answer in."""
