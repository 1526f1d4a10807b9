"""Stand-ins for models: each says what its head promises, and what they score on the suite is known exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pandas
import pytest
import toy_rows

from grace_vlm.evals.toy import responders
from grace_vlm.evals.toy.responders import FORMATTED_ORACLES, Responder

CONES = ("a red cone", "a blue cone", "a green cone", "none")
YES_NO = ("yes", "no")


def mmbench(suite: Path) -> Iterator[tuple[str, list[str], str]]:
    """(gold letter, options, key) of every row."""
    for row in toy_rows.tsv(suite / "mmbench" / "mmbench_dev_en_toy.tsv").to_dict("records"):
        yield row["answer"], [row[letter] for letter in "ABCD" if not pandas.isna(row[letter])], str(row["index"])


def accuracy(responder: Responder, asked: list[tuple[str, list[str], str]]) -> Fraction:
    return Fraction(sum(responder(*one) == one[0] for one in asked), len(asked))


@pytest.mark.parametrize(
    ("name", "letter", "yes_no", "open_"),
    [
        ("parentheses", "(C)", "(no)", "(4.25)"),
        ("bold", "**C**", "**no**", "**4.25**"),
        ("with_text", "C. a green cone", "no.", "4.25."),
        ("announced", "Answer: C", "Answer: no", "Answer: 4.25"),
        ("prose", "A green cone is shown, so C", "The answer is no", "The answer is 4.25"),
        ("text_only", "a green cone", "no", "4.25"),
        ("exclusion", "It is not A, so C", "It is not yes, so no", "It is 4.25"),
        ("lower_case", "c", "no", "4.25"),
    ],
)
def test_forms_of_the_right_answer(name: str, letter: str, yes_no: str, open_: str) -> None:
    respond = FORMATTED_ORACLES[name]
    assert respond("C", CONES, "q") == letter
    assert respond("no", YES_NO, "q") == yes_no
    assert respond("4.25", (), "q") == open_


def test_every_form_is_tested() -> None:
    names = "parentheses bold with_text announced prose text_only exclusion lower_case"
    assert " ".join(FORMATTED_ORACLES) == names


def test_exact_scores_over_mmbench(suite: Path) -> None:
    """Of n rotations every letter is right once: constants and option-blind responders have no circular point."""
    asked = list(mmbench(suite))
    assert accuracy(responders.oracle, asked) == 1
    assert accuracy(responders.always_wrong, asked) == 0
    per_question = Fraction(sum(len(options) >= 1 for _, options, key in asked if int(key) < 10**6), len(asked))
    assert accuracy(responders.constant("A"), asked) == per_question == Fraction(100, 370)
    assert accuracy(responders.constant("D"), asked) == Fraction(75, 370)
    chance = sum(Fraction(1, len(options)) for _, options, _ in asked) / len(asked)
    uniform = accuracy(responders.uniform(0), asked)
    assert abs(uniform - chance) < Fraction(3, 40), "within three of its standard deviations"
    assert accuracy(responders.uniform(1), asked) != uniform


def test_a_random_answer_depends_on_seed_and_key_alone(suite: Path) -> None:
    asked = list(mmbench(suite))
    first = {one[2]: responders.uniform(7)(*one) for one in asked}
    random.Random(0).shuffle(asked)
    respond = responders.uniform(7)
    assert {one[2]: respond(*one) for one in asked} == first
    assert set(first.values()) == set("ABCD")


def test_no_random_answer_is_impossible(suite: Path) -> None:
    for seed in range(5):
        for gold, options, key in mmbench(suite):
            assert responders.uniform(seed)(gold, options, key) in "ABCD"[: len(options)]
    assert responders.uniform(0)("yes", YES_NO, "q") in YES_NO
    assert responders.uniform(0)("7", (), "q") == ""


def test_blind_does_not_look_at_the_gold(suite: Path) -> None:
    for _, options, key in mmbench(suite):
        letters = "ABCD"[: len(options)]
        assert len({responders.blind(letter, options, key) for letter in letters}) == 1
    assert responders.blind("A", CONES, "q") == "C"
    assert responders.blind("no", YES_NO, "q") == responders.blind("yes", YES_NO, "q") == "yes"
    assert responders.blind("7", (), "q") == ""


def test_options_that_are_letters_themselves() -> None:
    """AI2D's masked labels: the gold is the letter of an option, whatever that option says."""
    options = ["D", "B", "A", "C"]
    assert [responders.gold_text(letter, options) for letter in "ABCD"] == options
    assert FORMATTED_ORACLES["with_text"]("A", options, "q") == "A. D"
    assert responders.replies("A", options) == list("ABCD")
    assert not responders.is_letter("E", CONES)
    assert not responders.is_letter("A", ())


def test_constant_yes_over_hallusion_scores_the_share_of_yes(suite: Path) -> None:
    asked = [
        ({"1": "yes", "0": "no"}[row["gt_answer"]], list(YES_NO), str(n))
        for n, row in enumerate(toy_rows.hallusion(suite))
    ]
    share = Fraction(sum(gold == "yes" for gold, *_ in asked), 240)
    assert accuracy(responders.constant("yes"), asked) == share
    assert accuracy(responders.always_wrong, asked) == 0


def test_the_suite_is_no_guessing_game(suite: Path) -> None:
    """No letter is right much more often than the others, in any benchmark with four options."""
    seed = [
        row
        for row in json.loads((suite / "seed" / "SEED-Bench.json").read_text())["questions"]
        if row["data_type"] == "image"
    ]
    golds = {
        "seed": [row["answer"] for row in seed],
        "mmstar": [row["answer"] for row in toy_rows.parquet(suite / "mmstar" / "mmstar.parquet")],
        "ai2d": [row["answer"] for row in toy_rows.parquet(suite / "ai2d" / "masked" / "test-00000-of-00001.parquet")],
    }
    for name, letters in golds.items():
        shares = [letters.count(letter) / len(letters) for letter in set(letters)]
        assert len(shares) == 4, name
        assert max(shares) < 0.38, name
