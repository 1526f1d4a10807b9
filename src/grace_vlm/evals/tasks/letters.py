"""A reply to a multiple-choice question -> a letter. Each function restates one program's rule and names it.

All take the reply and the options (letter -> text) and are pure. What a peer would answer with a random letter is
``unparsed`` here. A letter that is found but is none of the options' is ``unparsed`` too, by the rule ``out_of_range``.
The ``strict`` rule, our own, has a file of its own (strict.py).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from grace_vlm.evals.tasks.task import Extract

Options = Mapping[str, str]
LetterRule = Callable[[str, Options], Extract]


def card_letter(reply: str, options: Options) -> Extract:
    """GRACE's scripts (all but MMStar's): the first character of the upper-cased reply that is a valid letter, wherever
    it stands. "Answer: C" is A."""
    found = next((char for char in reply.strip().upper() if char in options), None)
    return Extract.unparsed() if found is None else Extract.ok(found, "first_letter")


def card_last_letter(reply: str, options: Options) -> Extract:
    """GRACE's eval_mmstar.py: the last valid letter that stands alone, else the last one anywhere. The article counts:
    "C. a green cone" is A."""
    text = reply.strip().upper()
    alone = re.findall(rf"\b([{''.join(options)}])\b", text) if options else []
    if alone:
        return Extract.ok(alone[-1], "last_alone")
    found = next((char for char in reversed(text) if char in options), None)
    return Extract.unparsed() if found is None else Extract.ok(found, "last_letter")


_SAID = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES = (
    *(f"{the}{said} is" for said in _SAID for the in ("the ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_letter(reply: str, options: Options) -> Extract:
    """lmms-eval's ``mcq_extract``: candidates in ten formats; the most trusted format wins, in it the last position."""
    text = reply.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not text:
        return Extract.unparsed()
    text = f" {text} "
    candidates = _marked(text, options) + _after_phrases(text, options) + _at_the_ends(text, options)
    if not candidates:
        candidates = [(0, text.rfind(letter), letter, "fallback") for letter in options if letter in text]
    if not candidates:
        return Extract.unparsed()
    _, _, letter, rule = max(candidates, key=lambda one: one[:2])
    return Extract.ok(letter, rule)


_Candidate = tuple[int, int, str, str]


_LMMS_FORMS = (
    (6, "({})", "parentheses"),
    (5, "{}.", "period"),
    (4, "{}:", "colon"),
    (3, "{})", "right_paren"),
    (2, "{} ", "space"),
)


def _marked(text: str, options: Options) -> list[_Candidate]:
    """(C) C. C: C) and C followed by a space, in falling order of trust."""
    return [
        (trust, text.rfind(mark), letter, rule) for trust, mark, letter, rule in _marks(tuple(options)) if mark in text
    ]


@lru_cache(maxsize=64)
def _marks(letters: tuple[str, ...]) -> list[tuple[int, str, str, str]]:
    """(trust, text, letter, rule) of every form with every letter."""
    return [(trust, form.format(letter), letter, rule) for trust, form, rule in _LMMS_FORMS for letter in letters]


def _after_phrases(text: str, options: Options) -> list[_Candidate]:
    found, lower = [], text.lower()
    for phrase in _PHRASES:
        at = lower.find(phrase)
        for letter in options if at != -1 else ():
            position = text.find(letter, at + len(phrase))
            if position != -1:
                found.append((7, position, letter, "phrase"))
    return found


def _at_the_ends(text: str, options: Options) -> list[_Candidate]:
    inner = text.strip()
    starts = [
        (10, 0, letter, "start")
        for letter in options
        if inner.startswith(letter) and (len(inner) == 1 or not inner[1].isalpha())
    ]
    ends = [
        (9, len(text) - 1, letter, "end")
        for letter in options
        if inner.endswith(letter) and (len(inner) == 1 or not inner[-2].isalpha())
    ]
    return starts + ends


def mmmu_letter(reply: str, options: Options) -> Extract:
    """MMMU's official parser (``eval_utils.py``), as lmms-eval has it, which strips replies: ``(C)``, else ``C`` before
    a space, else ``C.``, else, in a reply of more than five words, the text of an option; of several the last. Else a
    random letter there, unparsed here."""
    text = reply.strip()
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form, rule in (("({})", "parentheses"), ("{} ", "space"), ("{}.", "period")):
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            where = "({})" if rule == "parentheses" else " {} "
            return Extract.ok(max(found, key=lambda letter: text.rfind(where.format(letter))), rule)
    if len(text.split()) > 5:
        lower = text.lower()
        found = [letter for letter, option in options.items() if option.lower() in lower]
        if found:
            return Extract.ok(max(found, key=lambda letter: lower.rfind(options[letter].lower())), "option_text")
    return Extract.unparsed()


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def kit_letter(reply: str, options: Options) -> Extract:
    """VLMEvalKit's ``can_infer`` without its judge: one letter that stands alone among the last four words (of a reply
    with one letter), else "answer is C", else the one option whose text occurs."""
    if any(refusal in reply for refusal in _REFUSALS):
        return Extract.unparsed("refused")
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    alone = [letter for letter in options if letter in words]
    if len(alone) == 1 and words.index(alone[0]) > len(words) - 5:
        return Extract.ok(alone[0], "alone")
    if not alone and "Z" in words:
        return Extract.unparsed("refused")
    stated = _STATED.search(reply)
    if stated and stated.group(1).upper() in options:
        return Extract.ok(stated.group(1).upper(), "stated")
    lower = reply.lower()
    texts = {letter: text.lower() for letter, text in options.items() if text}
    named = [letter for letter, text in texts.items() if text in lower]
    if len(lower) <= 2 * sum(map(len, texts.values())) and len(named) == 1:
        return Extract.ok(named[0], "option_text")
    return Extract.unparsed()


_MMBENCH_SENTINEL = "Failed to obtain answer via API"
_MMBENCH_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def lmms_mmbench_letter(reply: str, options: Options) -> Extract:
    """lmms-eval's ``mmbench_en_dev_static``: MMBench's own rules (one of A to E alone among the words, then with
    punctuation, then the one option whose text occurs), and where they find nothing ``mcq_extract``. An option that is
    not there is one with the text ``nan`` to it, which "a banana" names."""
    texts = {letter: options.get(letter, "nan") for letter in "ABCD"}
    words = [] if _MMBENCH_SENTINEL in reply else reply.split()
    for form in ("{}", *_MMBENCH_FORMS):
        found = [letter for letter in "ABCDE" if form.format(letter) in words]
        is_article = form == "{}" and "A" in words and len(words) > 3
        if len(found) == 1 and not is_article:
            return in_range(found[0], options, "alone" if form == "{}" else "marked")
    lower = reply.lower()
    named = [letter for letter, text in texts.items() if text.lower() in lower]
    if len(named) == 1:
        return in_range(named[0], options, "option_text")
    other = lmms_letter(reply, texts)
    return other if other.value is None else in_range(other.value, options, other.rule)


def lmms_scienceqa_letter(reply: str, options: Options) -> Extract:
    """LLaVA's and lmms-eval's rule for ScienceQA: the letter alone, in either case, or a capital and a full stop first.
    ``(C)`` is nothing."""
    text = reply.strip()
    if len(text) == 1 and text.isalpha():
        return in_range(text.upper(), options, "whole")
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        return in_range(text[0], options, "leading_period")
    return Extract.unparsed()


def lmms_ai2d_letter(reply: str, options: Options) -> Extract:
    """lmms-eval's ``ai2d``: a capital and a full stop first, else the whole reply, case and punctuation apart."""
    match = re.match(r"\s*([A-Z])\.", reply)
    if match:
        return in_range(match.group(1), options, "leading_period")
    whole = reply.strip().lower().translate(str.maketrans("", "", string.punctuation))
    return in_range(whole.upper(), options, "whole") if len(whole) == 1 and whole.isalpha() else Extract.unparsed()


def lmms_seed_letter(reply: str, options: Options) -> Extract:
    """lmms-eval's ``seedbench``: the first character of the reply, in either case. "Answer: C" is A."""
    first = reply.strip()[:1]
    return in_range(first.upper(), options, "first_character") if first.isalpha() else Extract.unparsed()


def in_range(letter: str, options: Iterable[str], rule: str) -> Extract:
    """The letter, if it is one of the options'."""
    return Extract.ok(letter, rule) if letter in options else Extract.unparsed("out_of_range")
