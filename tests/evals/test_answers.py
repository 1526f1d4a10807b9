"""Right or wrong by rule: whole answers, nothing searched for."""

from __future__ import annotations

import pytest

from grace_vlm.evals.answers import is_correct, normalise


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("yes", "Yes"),
        ("Yes.", "yes"),
        ("  blue\n", "blue"),
        ("a  blue \t triangle", "A blue triangle"),
        ("red .", "red"),
        ("3", "3"),
        ("3.5", "3.5"),
        ("A.", "a"),
    ],
)
def test_right(answer: str, gold: str) -> None:
    assert is_correct(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Answer: B", "A"),
        ("Answer: B", "B"),
        ("it is not red", "red"),
        ("red or blue", "red"),
        ("yes no", "yes"),
        ("13", "3"),
        ("3", "3.0"),
        ("", "yes"),
        ("..", "."),
        ("not yes", "yes"),
    ],
)
def test_wrong(answer: str, gold: str) -> None:
    assert not is_correct(answer, gold)


def test_only_one_closing_period_goes() -> None:
    assert normalise("wait...") == "wait.."
    assert normalise(" . ") == ""
    assert normalise("e.g.") == "e.g"
