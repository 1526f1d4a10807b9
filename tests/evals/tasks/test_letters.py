"""Parsers of letters: the measured table, the traps, and each rule against a second statement of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_vlm.evals.tasks import letters
from grace_vlm.evals.tasks.strict import strict_letter

OPTIONS = {"A": "a red ball", "B": "a blue box", "C": "a green cone", "D": "a dog"}
TABLE = """
(C)                         C C C C C - C
C. a green cone             C A C C C C C
Answer: C                   A C C C C - C
A green cone is shown, so C A C A C C - C
**C**                       C C C - C - C
a green cone                A A - - C - C
It is not A, so C           A C C C - - C
"""
"""shared/evaluation.md, "Parsers, gold C (m)", and in the last column ours. A dash: not found."""
PARSERS = (
    *(letters.card_letter, letters.card_last_letter, letters.lmms_letter, letters.mmmu_letter, letters.kit_letter),
    *(letters.lmms_scienceqa_letter, strict_letter),
)


@pytest.mark.parametrize("line", TABLE.strip().splitlines())
def test_the_measured_table(line: str) -> None:
    match = re.fullmatch(r"(.*?) +((?:[A-D-] ?){7})", line)
    assert match is not None
    reply, expected = match.group(1), match.group(2).split()
    found = [parser(reply, OPTIONS) for parser in PARSERS]
    assert [one.value or "-" for one in found] == expected
    assert [one.status for one in found] == ["unparsed" if one == "-" else "ok" for one in expected]


@pytest.mark.parametrize(
    ("reply", "value", "rule"),
    [
        ("c", "C", "bare"),
        ("(c).", "C", "bare"),
        ("  __C__\n", "C", "bare"),
        (r"$\boxed{\text{C}}$", "C", "bare"),
        ("E", None, "out_of_range"),
        ("The answer is (c).", "C", "stated"),
        ("The correct answer is **C** because it is green.", "C", "stated"),
        ("Answer: B. No, wait. Answer: C", "C", "stated"),
        ("The answer is a dog", "D", "option_text"),
        ("The answer is E.", None, "out_of_range"),
        ("Option C is correct.", "C", "stated"),
        ("B) a blue box", "B", "leading"),
        ("A. is wrong and B. is right", None, "several"),
        ("Therefore, (D).", "D", "conclusion"),
        ("It is C", "C", "conclusion"),
        ("It is not C", None, "denied"),
        ("A or B", None, "none"),
        ("A dog", "D", "option"),
        ("It isn't a dog", None, "denied"),
        ("a dog and a blue box", None, "several"),
        ("I see a green cone there.", "C", "option_text"),
        ("", None, "none"),
        ("I", None, "out_of_range"),
        ("Apple", None, "none"),
    ],
)
def test_strict_letters(reply: str, value: str | None, rule: str) -> None:
    found = strict_letter(reply, OPTIONS)
    assert (found.value, found.rule) == (value, rule)
    assert found.status == ("unparsed" if value is None else "ok")


def test_strict_reads_labels_entities_and_the_longer_option() -> None:
    labels = {"A": "A", "B": "C", "C": "E", "D": "F"}
    assert strict_letter("F", labels).value == "D"
    assert strict_letter("C", labels).value == "C"
    entities = {"A": "5 &lt; 6", "B": "5 &gt; 6"}
    assert strict_letter("5 < 6", entities).value == "A"
    assert strict_letter("so it is 5 &gt; 6", entities).value == "B"
    assert strict_letter("the dark red one", {"A": "red", "B": "dark red"}).value == "B"


@pytest.mark.parametrize(
    ("parser", "reply", "value"),
    [
        (letters.card_letter, "none", None),
        (letters.card_letter, "E", None),
        (letters.card_letter, "because", "B"),
        (letters.card_last_letter, "because", "A"),
        (letters.card_last_letter, "E", None),
        (letters.lmms_letter, "The correct answer is (B).", "B"),
        (letters.lmms_letter, "Answer is B because A is red", "A"),
        (letters.lmms_letter, "c", None),
        (letters.lmms_letter, "정답은 D입니다", "D"),
        (letters.mmmu_letter, "c", None),
        (letters.mmmu_letter, "(A) is red, (B) is blue", "B"),
        (letters.mmmu_letter, "I think that it is a dog", "D"),
        (letters.mmmu_letter, "it is a dog", None),
        (letters.kit_letter, "c", None),
        (letters.kit_letter, "A is what I would take, all in all", None),
        (letters.kit_letter, "The answer is A, which I would take all in all", "A"),
        (letters.kit_letter, "Cannot determine the answer C", None),
        (letters.kit_letter, "Z", None),
        (letters.lmms_mmbench_letter, "A green one", "A"),
        (letters.lmms_mmbench_letter, "A green one there", "A"),
        (letters.lmms_mmbench_letter, "E", None),
        (letters.lmms_mmbench_letter, "it is A green cone", "C"),
        (letters.lmms_mmbench_letter, "it is a green cone", "C"),
        (letters.lmms_mmbench_letter, "The answer is (B)", "B"),
        (letters.lmms_scienceqa_letter, "c", "C"),
        (letters.lmms_scienceqa_letter, "C.", "C"),
        (letters.lmms_scienceqa_letter, "c. a green cone", None),
        (letters.lmms_scienceqa_letter, "E", None),
        (letters.lmms_ai2d_letter, " C. a green cone", "C"),
        (letters.lmms_ai2d_letter, "(c)", "C"),
        (letters.lmms_ai2d_letter, "C\n", "C"),
        (letters.lmms_ai2d_letter, "C .", None),
        (letters.lmms_mmbench_letter, "Failed to obtain answer via API E", "A"),
        (letters.lmms_ai2d_letter, "E. one", None),
        (letters.lmms_seed_letter, "Answer: C", "A"),
        (letters.lmms_seed_letter, "cat", "C"),
        (letters.lmms_seed_letter, "(C)", None),
        (letters.lmms_seed_letter, "", None),
    ],
)
def test_traps_of_the_peers(parser: letters.LetterRule, reply: str, value: str | None) -> None:
    found = parser(reply, OPTIONS)
    assert (found.value, found.status) == (value, "unparsed" if value is None else "ok")


# --- a second statement of every rule, in other words ---

TOKENS = (
    *("A", "B", "C", "D", "E", "a", "c", "(A)", "(B)", "(C)", "A.", "B.", "C:", "D)", "(D).", "**C**", ":B", "B,"),
    *("Answer:", "the answer is", "The best option is", "I choose", "not", "so", "it", "is", "green", "cone", "Z"),
    *("a red ball", "a dog", "a green cone", "dog", ".", "!", "'", "\n", "because", "CAB", "x"),
)
REPLIES = st.lists(
    st.lists(st.sampled_from(TOKENS), max_size=7).map(" ".join) | st.sampled_from(TOKENS), min_size=40, max_size=40
)
Second = Callable[[str, Mapping[str, str]], str | None]


def first_character(reply: str, options: Mapping[str, str]) -> str | None:
    match = re.search(f"[{''.join(options)}]", reply.upper())
    return match.group() if match else None


def last_alone(reply: str, options: Mapping[str, str]) -> str | None:
    text = f" {reply.upper()} "
    places = [place for place, char in enumerate(text) if char in options]
    alone = [place for place in places if not (text[place - 1] + text[place + 1]).strip().isalnum()]
    alone = [p for p in alone if not any(char.isalnum() or char == "_" for char in text[p - 1 : p + 2 : 2])]
    return text[(alone or places)[-1]] if places else None


def ranked(reply: str, options: Mapping[str, str]) -> str | None:
    text = reply.strip()
    for mark in (",", ".", "!", "?", ";", ":", "'", '"'):
        text = re.sub(rf"^{re.escape(mark)}+|{re.escape(mark)}+$", "", text)
    bare, best, text = text.strip(), (-1, -1), f" {text} "
    value = None
    for letter in options:
        scores = [(6, text.rfind(f"({letter})")), (5, text.rfind(f"{letter}.")), (4, text.rfind(f"{letter}:"))]
        scores += [(3, text.rfind(f"{letter})")), (2, text.rfind(f"{letter} "))]
        for phrase in ("answer is", "the answer is", "the best option is", "best option is", "i choose"):
            if phrase in text.lower():
                scores.append((7, text.find(letter, text.lower().index(phrase) + len(phrase))))
        scores.append((10, 0 if re.match(rf"{letter}(?![^\W\d_])", bare) else -1))
        scores.append((9, len(text) - 1 if re.search(rf"(?<![^\W\d_]){letter}$", bare) else -1))
        for score in scores:
            if score[1] >= 0 and score > best:
                best, value = score, letter
    if value is None:
        found = {text.rfind(letter): letter for letter in options if letter in text}
        value = found[max(found)] if found else None
    return value


def official_mmmu(reply: str, options: Mapping[str, str]) -> str | None:
    text = reply
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    names = "".join(options)
    bracketed = re.findall(rf"\(([{names}])\)", text)
    if bracketed:
        return bracketed[-1]
    if re.search(rf"[{names}] ", text):
        alone = {text.rfind(f" {letter} "): letter for letter in reversed(options) if f"{letter} " in text}
        return alone[max(alone)]
    dotted = [letter for letter in options if f"{letter}." in text]
    if dotted:
        alone = {text.rfind(f" {letter} "): letter for letter in reversed(dotted)}
        return alone[max(alone)]
    if len(text.split()) <= 5:
        return None
    ends = {text.lower().rfind(option): letter for letter, option in options.items()}
    return ends[max(ends)] if max(ends) >= 0 else None


def inferred(reply: str, options: Mapping[str, str]) -> str | None:
    words = re.split(r"[\s.()\[\],:;!*#{}]+", reply)
    words = [word for word in words if word]
    hits = [letter for letter in options if words.count(letter)]
    if len(hits) == 1 and words.index(hits[0]) >= len(words) - 4:
        return hits[0]
    if not hits and "Z" in words:
        return None
    if said := re.search(r"answer\s+is\s+\**([A-Da-d])", reply, re.IGNORECASE):
        return said.group(1).upper()
    named = {letter for letter, option in options.items() if option in reply.lower()}
    too_long = len(reply) > 2 * sum(len(option) for option in options.values())
    return named.pop() if len(named) == 1 and not too_long else None


def llava(reply: str, options: Mapping[str, str]) -> str | None:
    match = re.fullmatch(r"\s*(?:([A-Za-z])|([A-Z])\..*)\s*", reply, re.DOTALL)
    letter = (match.group(1) or match.group(2)).upper() if match else None
    return letter if letter in options else None


@pytest.mark.parametrize(
    ("parser", "second"),
    [
        (letters.card_letter, first_character),
        (letters.card_last_letter, last_alone),
        (letters.lmms_letter, ranked),
        (letters.mmmu_letter, official_mmmu),
        (letters.kit_letter, inferred),
        (letters.lmms_scienceqa_letter, llava),
    ],
    ids=lambda rule: rule.__name__,
)
def test_each_rule_says_what_its_second_statement_says(parser: letters.LetterRule, second: Second) -> None:
    seen: set[str | None] = set()

    @settings(max_examples=30, derandomize=True, deadline=None)
    @given(REPLIES)
    def check(replies: list[str]) -> None:
        for reply in replies:
            seen.add(parser(reply, OPTIONS).value)
            assert parser(reply, OPTIONS).value == second(reply, OPTIONS), reply

    check()
    assert seen == {"A", "B", "C", "D", None}


# --- strict: replies whose meaning is known because we made them ---

SAYS = (
    *("{L}", "({L})", "{l}", "{L}.", "**{L}**", "*{L}*", "\\boxed{{{L}}}", "Answer: {L}", "The answer is {L}."),
    *("the correct answer is ({L})", "Answer: **{L}**", "{L}. {text}", "({L}) {text}", "{L}: {text}", "{text}"),
    *("{text}.", "A cone is shown, so {L}", "Not the ball, therefore {L}.", "I see {text} in it.", "{L} is correct."),
)
SAYS_NOTHING = (
    *(
        "not {L}",
        "It is not ({L})",
        "{L} or {M}",
        "({L}) or ({M})",
        "{L}. {text} or {M}. {other}",
        "{text} and {other}",
    ),
    *("It isn't {text}", "E", "(E)", "Answer: E", "A thing", "I cannot tell", "", "Which one?", "{L}{M}"),
)
PAIRS = st.sampled_from([(a, b) for a in OPTIONS for b in OPTIONS if a != b])


def filled(form: str, pair: tuple[str, str]) -> str:
    letter, other = pair
    return form.format(L=letter, l=letter.lower(), M=other, text=OPTIONS[letter], other=OPTIONS[other])


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SAYS), PAIRS), min_size=25, max_size=25))
def test_strict_finds_what_a_reply_says(made: list[tuple[str, tuple[str, str]]]) -> None:
    for form, pair in made:
        assert strict_letter(filled(form, pair), OPTIONS).value == pair[0], filled(form, pair)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SAYS_NOTHING), PAIRS), min_size=25, max_size=25))
def test_strict_finds_nothing_where_nothing_is_said(made: list[tuple[str, tuple[str, str]]]) -> None:
    for form, pair in made:
        assert strict_letter(filled(form, pair), OPTIONS).status == "unparsed", filled(form, pair)
