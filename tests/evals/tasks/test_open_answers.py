"""Open answers of MMMU: the official candidates, the card's shorter rule, golds that are lists."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_vlm.evals.tasks.open_answers import card_open, gold_answers, mmmu_candidates, mmmu_open


@pytest.mark.parametrize(
    ("reply", "gold", "card", "official"),
    [
        ("10", "10", True, True),
        ("The answer is 10.", "10", True, True),
        ("x = 10.004", "10", False, True),
        ("10.00005", "10", True, True),
        ("It is 3, so 10", "10", True, True),
        ("1,000", "1000", True, True),
        ("1000", "1,000", True, True),
        ("2e3", "2000", False, True),
        ("10 V", "10 V", True, True),
        ("about 10 V in all", "10 V", False, True),
        ("Bar chart", "bar chart", True, True),
        ("a bar chart", "Bar chart", False, True),
        ("It is a barn", "bar", False, True),
        ("bar", "Bar", True, True),
        ("x", "X", True, True),
        ("xy", "X", False, False),
        ("it is x there", "X", True, True),
        ("no idea", "10", False, False),
        ("", "10", False, False),
    ],
)
def test_what_each_program_accepts(reply: str, gold: str, card: bool, official: bool) -> None:
    assert card_open(reply, gold) is card
    assert mmmu_open(reply, (gold,)) is official


def test_a_gold_list_is_several_answers_for_us_and_one_text_for_the_peers() -> None:
    gold = "['8.4', '8.4 V']"
    assert gold_answers(gold) == ("8.4", "8.4 V")
    assert mmmu_open("It is 8.40", gold_answers(gold))
    assert not mmmu_open("It is 8.40", (gold,))
    assert not card_open("8.4", gold)
    assert gold_answers("&lt; 5") == ("< 5",)
    assert gold_answers("10") == ("10",)
    assert gold_answers("[]") == ("[]",)


def test_candidates_of_a_reply() -> None:
    """Per line the shortest tail after an indicator; "=" counts in the last line alone; numbers of the tails."""
    assert mmmu_candidates("The result is 1,250.\nThus I = V / R = 3.126 A.") == [
        1250.0,
        "3.126 a",
        1250.0,
        250.0,
        3.13,
    ]
    assert mmmu_candidates("I = 4\nno more") == ["i = 4\nno more", 4.0]
    assert mmmu_candidates("X") == [" x", "x "]
    # The official split at full stops looks for a capital in lower-cased text: there is none.
    assert mmmu_candidates("It is a. So B") == [" b", "b "]


NUMBERS = st.integers(-10_000, 10_000).map(lambda n: n / 100)
FORMS = (
    "{}",
    "{}.",
    "The answer is {}",
    "so {}",
    "x = {}",
    "thus, it could be {} V",
    "First 7.\nThe final result is {}",
)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FORMS), NUMBERS, NUMBERS), min_size=30, max_size=30))
def test_numbers_in_sentences(made: list[tuple[str, float, float]]) -> None:
    """1,200 constructed replies: right exactly where the number is the gold one, to two decimals."""
    for form, number, gold in made:
        reply = form.format(f"{number:.2f}")
        for wanted in (number, gold):
            assert mmmu_open(reply, (f"{wanted:g}",)) is (number == wanted), (reply, wanted)
            first = re.search(r"-?\d+\.?\d*", reply)
            assert first is not None
            as_words = f"{wanted:g}".replace(".", "").replace("-", "") in [
                "".join(char for char in word if char.isalnum()) for word in reply.lower().split()
            ]
            assert card_open(reply, f"{wanted:g}") is (float(first.group()) == wanted or as_words), (reply, wanted)


WORDS = st.sampled_from(("bar chart", "pie", "line", "scatter plot", "histogram"))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FORMS), WORDS, WORDS), min_size=30, max_size=30))
def test_words_in_sentences(made: list[tuple[str, str, str]]) -> None:
    for form, said, gold in made:
        reply = form.format(said.title())
        assert mmmu_open(reply, (gold,)) is (said == gold)
        plain = re.sub(r"[^\w\s]", "", reply.lower())
        assert card_open(reply, gold) is (plain == gold or gold in plain.split())
