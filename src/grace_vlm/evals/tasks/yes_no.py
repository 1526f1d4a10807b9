"""A reply to a yes/no question -> ``yes`` or ``no``. Each function restates one program's rule and names it."""

from __future__ import annotations

import re

from grace_vlm.evals.tasks.task import Extract

_CARD_YES = frozenset(("yes", "true", "correct", "right", "is", "are", "does", "can"))
_CARD_NO = frozenset(("no", "not", "false", "incorrect", "wrong", "cannot", "isn't", "aren't", "doesn't", "don't"))


def card_yes_no(reply: str) -> Extract:
    """GRACE's eval_hallusion.py: the first word that is on either list. "It is not" is yes, for the word "is"."""
    for word in re.findall(r"\b([a-z']+)\b", reply.strip().lower()):
        if word in _CARD_YES:
            return Extract.ok("yes", word)
        if word in _CARD_NO:
            return Extract.ok("no", word)
    return Extract.unparsed()


def kit_yes_no(reply: str) -> Extract:
    """VLMEvalKit's ``YOrN_Extraction``: yes or no among the words, and not both. Emphasis hides a word."""
    words = strip_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return Extract.unparsed("several" if "yes" in words else "none")
    return Extract.ok("yes" if "yes" in words else "no", "word")


def lmms_whole(reply: str) -> Extract:
    """lmms-eval's ``pope``: the whole reply, lower-cased."""
    whole = reply.lower().strip()
    return Extract.ok(whole, "whole") if whole in ("yes", "no") else Extract.unparsed()


def pope_yes_no(reply: str) -> Extract:
    """POPE's official rule, also LLaVA's ``eval_pope.py``: in the first sentence, without commas, one of the words
    ``no``, ``No``, ``not`` is no; all else is yes, an empty reply too. "NO" is yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    found = next((word for word in words if word in ("no", "No", "not")), None)
    return Extract.ok("yes", "nothing_denied") if found is None else Extract.ok("no", found.lower())


def mme_yes_no(reply: str) -> Extract:
    """MME's official rule (``calculation.py``, also lmms-eval's): the whole reply without full stops, ``y`` or ``n``,
    else yes or no among the first four characters. "Not sure" is no."""
    text = reply.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return Extract.ok(text, "whole")
    if len(text) == 1:
        word = {"y": "yes", "n": "no"}.get(text)
        return Extract.ok(word, "initial") if word else Extract.unparsed()
    for word in ("yes", "no"):
        if word in text[:4]:
            return Extract.ok(word, "first_four")
    return Extract.unparsed()


_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def strip_punctuation(text: str, period: str = r"(?<!\d)\.(?!\d)", thousands: str = r"\d,\d") -> str:
    """The VQA evaluator's: a mark next to a space anywhere in the text goes, else it becomes a space; full stops go
    where ``period`` says, the first 32 of them (its ``re.UNICODE`` stands where the count belongs)."""
    out, has_thousands = text, re.search(thousands, text) is not None
    for mark in _MARKS:
        goes = mark + " " in text or " " + mark in text or has_thousands
        out = out.replace(mark, "" if goes else " ")
    return re.sub(period, "", out, count=int(re.UNICODE))
