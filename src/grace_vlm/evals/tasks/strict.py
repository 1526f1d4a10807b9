"""Sound extraction: the ``strict`` profile's rules for letters and for yes and no.

A reply counts when it says one thing in a form that says so: alone, as a statement ("the answer is C"), at the
beginning ("C. a green cone"), as a conclusion ("so C"), or by the words of exactly one option. A letter inside a word,
the article "a", a letter that is denied ("not A") and two different letters are no answer; they are ``unparsed``, which
is counted and wrong. Emphasis, quotes and LaTeX's ``\\boxed{}`` around an answer are looked through, and HTML entities
are read as the signs that they stand for.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from grace_vlm.evals.tasks.letters import in_range
from grace_vlm.evals.tasks.task import Extract

_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}?\}")
_EMPHASIS = re.compile(r"[*_`\"“”$]+")
_BARE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,;!]?")
_STATED = re.compile(
    r"\b(?:answer|option|choice)(?: letter)?(?: is|:| would be| should be)(?: option| choice)?:?\s*"
    r"(?!a\s+(?!because|since|as\b)\w)[(\[]?([a-z])[)\]]?(?![\w'’])",
    re.IGNORECASE,
)
_ASSERTED = re.compile(r"(?<!\w)[(\[]?([A-Z])[)\]]? is (?:the )?(?:correct|right|best|answer)\b")
_LEADING = re.compile(r"(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)])(?=\s|$)")
_MARKED = re.compile(r"(?<!\w)(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)](?=\s))")
_CONCLUSION = re.compile(
    r"(?:\b(?i:so|thus|hence|therefore|is|be|choose|pick|select)|=|:|→|->)[,:]?\s+[(\[]?([A-Z])[)\]]?[.!]?$"
)
_DENIED = re.compile(r"\b(?:not|never|neither|nor|cannot|except)\b|n['’]t\b", re.IGNORECASE)


def cleaned(text: str) -> str:
    """Entities as signs, markup gone, single spaces."""
    text = _BOXED.sub(r"\1", html.unescape(text))
    return " ".join(_EMPHASIS.sub("", text).split())


def strict_letter(reply: str, options: Mapping[str, str]) -> Extract:
    """Our own rule, in this order: the letter alone (in either case), "answer is C" or "C is correct" (the last such),
    a marked letter first with no other marked letter after it, a conclusion at the end, the words of one option."""
    text = cleaned(reply)
    if bare := _BARE.fullmatch(text):
        return _bare(bare.group(1).upper(), text, options)
    if stated := _STATED.findall(text) or _ASSERTED.findall(text):
        return in_range(stated[-1].upper(), options, "stated")
    if leading := _LEADING.match(text):
        letter = leading.group(1) or leading.group(2)
        others = {one or other for one, other in _MARKED.findall(text)} - {letter}
        return Extract.unparsed("several") if others & set(options) else in_range(letter, options, "leading")
    if conclusion := _CONCLUSION.search(text):
        return in_range(conclusion.group(1), options, "conclusion")
    return _by_words(text, options)


def _bare(letter: str, text: str, options: Mapping[str, str]) -> Extract:
    """A letter alone. Where it is no option's letter it may still be the text of one: diagrams have labels."""
    found = in_range(letter, options, "bare")
    return found if found.status == "ok" else _by_words(text, options, otherwise="out_of_range")


def _by_words(text: str, options: Mapping[str, str], otherwise: str = "none") -> Extract:
    """The one option that is the whole reply, or else that occurs in a reply without a denial."""
    said = _plain(text)
    texts = {letter: _plain(cleaned(option)) for letter, option in options.items()}
    whole = [letter for letter, option in texts.items() if option and option == said]
    if len(whole) == 1:
        return Extract.ok(whole[0], "option")
    if _DENIED.search(text):
        return Extract.unparsed("denied")
    named = {
        letter: option
        for letter, option in texts.items()
        if len(option) > 1 and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)
    }
    # "red" occurs in "dark red": the longer one is what is named.
    longest = [a for a, text_a in named.items() if not any(text_a in b and text_a != b for b in named.values())]
    if len(longest) == 1:
        return Extract.ok(longest[0], "option_text")
    return Extract.unparsed("several" if longest else otherwise)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


_YES_NO_STATED = re.compile(r"\banswer(?: is|:)\s*(yes|no)\b", re.IGNORECASE)
_YES_NO_FIRST = re.compile(
    r"(yes|no(?!\s+(?!(?:it|the|this|that|there|they|these|those|he|she|we|you|i)\b)\w))(?![\w'’-])", re.IGNORECASE
)


def strict_yes_no(reply: str) -> Extract:
    """Our own rule: the reply begins with yes or no as a word of its own ("No, there is a dog"), or says "the answer is
    no" (the last such). "There is no dog", "No dog is there" and "It is not" are unparsed: whether they deny depends on
    the question. So is a reply that says both."""
    text = cleaned(reply)
    if stated := _YES_NO_STATED.findall(text):
        return Extract.ok(stated[-1].lower(), "stated")
    if first := _YES_NO_FIRST.match(text):
        word = first.group(1).lower()
        opposite = {"yes": "no", "no": "yes"}[word]
        says_both = re.search(rf"(?:^|[.,;/|]|\bor\b|\band\b)\s*{opposite}(?=[.,;/|]|$)", text, re.IGNORECASE)
        return Extract.unparsed("several") if says_both else Extract.ok(word, "first")
    return Extract.unparsed()
