"""Is this answer right? Rules, no judge.

An answer is lower-cased, stripped of white space and a closing full stop, and compared whole with the gold answer.
Nothing is searched for inside a longer reply: "Answer: B" is not A, and "it is not red" is not "red".
"""

from __future__ import annotations

import re


def normalise(text: str) -> str:
    """Lower case, single spaces, no closing period."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip().lower()


def is_correct(answer: str, gold: str) -> bool:
    """Whole-string match after ``normalise``."""
    return normalise(answer) == normalise(gold)
