"""Parsers of yes and no: the traps, and each rule against a second statement of it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_vlm.evals.tasks.strict import strict_yes_no
from grace_vlm.evals.tasks.task import Extract
from grace_vlm.evals.tasks.yes_no import card_yes_no, kit_yes_no, lmms_whole, mme_yes_no

Rule = Callable[[str], Extract]


@pytest.mark.parametrize(
    ("reply", "card", "kit", "strict"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("No.", "no", "no", "no"),
        ("yes, it is", "yes", "yes", "yes"),
        ("No, there is a dog.", "no", "no", "no"),
        # What the card reads as yes.
        ("It is not", "yes", None, None),
        ("There is no dog", "yes", "no", None),
        ("The statement is false", "yes", None, None),
        ("No dog is there", "no", "no", None),
        ("No, it is not. Yes", "no", None, None),
        ("Yes and no", "yes", None, None),
        ("yes/no", "yes", None, None),
        ("**No**", "no", None, "no"),
        ("The answer is no.", "yes", "no", "no"),
        ("Answer: yes", "yes", "yes", "yes"),
        ("Yes it is", "yes", "yes", "yes"),
        ("No it is not", "no", "no", "no"),
        ("no-one", "no", "no", None),
        ("notable", None, None, None),
        ("true", "yes", None, None),
        ("", None, None, None),
        ("It isn't", "no", None, None),
    ],
)
def test_traps(reply: str, card: str | None, kit: str | None, strict: str | None) -> None:
    found = [rule(reply) for rule in (card_yes_no, kit_yes_no, strict_yes_no)]
    assert [one.value for one in found] == [card, kit, strict]
    assert [one.status for one in found] == ["ok" if one else "unparsed" for one in (card, kit, strict)]


@pytest.mark.parametrize(
    ("rule", "reply", "value"),
    [
        (lmms_whole, " Yes\n", "yes"),
        (lmms_whole, "Yes.", None),
        (mme_yes_no, "Yes.", "yes"),
        (mme_yes_no, "N", "no"),
        (mme_yes_no, "x", None),
        (mme_yes_no, "Not sure", "no"),
        (mme_yes_no, "It is yes", None),
        (mme_yes_no, "I know", None),
        (mme_yes_no, "A no", "no"),
        (mme_yes_no, "", None),
    ],
)
def test_rules_for_whole_replies(rule: Rule, reply: str, value: str | None) -> None:
    assert rule(reply).value == value


TOKENS = ("Yes", "yes,", "YES.", "no", "No,", "not", "It", "is", "can", "cannot", "isn't", "false", "true", "dog", "/")
TOKENS += ("y", "n", "the", "answer", "1,000", "-", "!", "yes-no", "nose", "eyes", ".", "wrong", "right")
REPLIES = st.lists(st.lists(st.sampled_from(TOKENS), max_size=6).map(" ".join), min_size=40, max_size=40)


def first_listed(reply: str) -> str | None:
    said = {"yes": "yes true correct right is are does can", "no": "no not false incorrect wrong cannot"}
    lists = {word: value for value, words in said.items() for word in words.split()}
    lists |= dict.fromkeys(("isn't", "aren't", "doesn't", "don't"), "no")
    words = re.split(r"[^a-z']+", reply.lower())
    return next((lists[word] for word in words if word in lists), None)


def one_of_both(reply: str) -> str | None:
    text = reply.lower()
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_a_space = f"{mark} " in reply.lower() or f" {mark}" in reply.lower() or "1,0" in reply
        text = text.replace(mark, "" if beside_a_space else " ")
    words = {word.strip(".") for word in text.split()}
    found = words & {"yes", "no"}
    return found.pop() if len(found) == 1 else None


def first_four(reply: str) -> str | None:
    text = reply.strip().lower().replace(".", "")
    short = {"y": "yes", "n": "no"}.get(text)
    if len(text) == 1:
        return short
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else None


@pytest.mark.parametrize(
    ("rule", "second"), [(card_yes_no, first_listed), (kit_yes_no, one_of_both), (mme_yes_no, first_four)]
)
def test_each_rule_says_what_its_second_statement_says(rule: Rule, second: Callable[[str], str | None]) -> None:
    seen: set[str | None] = set()

    @settings(max_examples=30, derandomize=True, deadline=None)
    @given(REPLIES)
    def check(replies: list[str]) -> None:
        for reply in replies:
            seen.add(rule(reply).value)
            assert rule(reply).value == second(reply), reply

    check()
    assert seen == {"yes", "no", None}


SAYS = (
    "{}",
    "{}.",
    "**{}**",
    "{}, it is so.",
    "The answer is {}.",
    "Answer: {}",
    "  {}\n",
    "{}! I see it.",
    "{}; a dog",
)
SAYS_NOTHING = (
    "It is not",
    "There is no dog",
    "{} or {other}",
    "{}/{other}",
    "maybe",
    "",
    "{}, {other}",
    "{} and {other}",
)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SAYS), st.sampled_from(("Yes", "no", "No", "yes"))), min_size=25, max_size=25)
)
def test_strict_finds_what_a_reply_says(made: list[tuple[str, str]]) -> None:
    for form, word in made:
        assert strict_yes_no(form.format(word)).value == word.lower(), form.format(word)


@pytest.mark.parametrize("form", SAYS_NOTHING)
@pytest.mark.parametrize(("word", "other"), [("yes", "no"), ("No", "Yes")])
def test_strict_finds_nothing_where_nothing_is_said(form: str, word: str, other: str) -> None:
    assert strict_yes_no(form.format(word, other=other)).status == "unparsed"
