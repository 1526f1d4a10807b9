"""Open answers of MMMU: a short phrase or a number. Each function restates one program's rule and names it."""

from __future__ import annotations

import html
import re
import string
from collections.abc import Sequence

from grace_vlm.evals.tasks.columns import literal

Answer = str | float


def card_open(reply: str, gold: str) -> bool:
    """GRACE's eval_mmmu.py: for a gold number the reply's first number within 1e-4; else, or besides, the same words,
    or a gold answer that is one of the reply's words. A gold list is one text there."""
    said = reply.strip()
    if not said or not gold:
        return False
    number, first = _card_number(gold), re.search(r"-?\d+(?:\.\d+)?", said)
    if number is not None and first and abs(float(first.group()) - number) < 1e-4:
        return True
    plain, wanted = _card_plain(said), _card_plain(gold)
    return bool(wanted) and (wanted == plain or wanted in plain.split())


def _card_number(text: str) -> float | None:
    try:
        return float(text.strip().replace(",", "").rstrip("."))
    except ValueError:
        return None


def _card_plain(text: str) -> str:
    return " ".join(text.lower().strip().translate(str.maketrans("", "", string.punctuation)).split())


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_candidates(reply: str) -> list[Answer]:
    """MMMU's official ``parse_open_response``: the shortest tail after an indicator ("is", "so", "answer", and "=" in
    the last line) of every line, or the whole reply; with all numbers in these.

    The official split at full stops never happens, since it looks for a capital in lower-cased text; nor does it here.
    """
    text = reply.strip().strip(".").lower()
    lines = text.split("\n")
    tails = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        found = [line.rsplit(indicator, 1)[-1].strip() for indicator in indicators if indicator in line]
        shortest = _shortest(found)
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(shortest)
    tails = tails or [text]
    numbers = [one for tail in tails for pattern in _NUMBERS for one in re.findall(pattern, tail)]
    return [answer for one in (*tails, *numbers) for answer in mmmu_normal(one)]


def _shortest(found: Sequence[str]) -> str:
    """The first of the shortest; an empty one gives way to whatever comes after it, as there."""
    best = ""
    for one in found:
        if not best or len(one) < len(best):
            best = one
    return best


def mmmu_normal(text: str) -> list[Answer]:
    """MMMU's official ``normalize_str``: a number with two decimals, else lower case; one letter is wanted with a space
    beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def mmmu_open(reply: str, golds: Sequence[str]) -> bool:
    """MMMU's official ``eval_open``: some candidate holds a gold text, or is a gold number."""
    wanted = [answer for gold in golds for answer in mmmu_normal(gold)]
    for candidate in mmmu_candidates(reply):
        if isinstance(candidate, str):
            if any(isinstance(one, str) and one in candidate for one in wanted):
                return True
        elif candidate in wanted:
            return True
    return False


def gold_answers(gold: str) -> tuple[str, ...]:
    """The answers that a cell allows: ``"['10', '10 V']"`` are two. lmms-eval takes it for one text."""
    value = literal(html.unescape(gold))
    if isinstance(value, list | tuple) and value:
        return tuple(str(one) for one in value)
    return (html.unescape(gold),)
