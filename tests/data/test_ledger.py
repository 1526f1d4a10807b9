"""One line a bad row, whatever is killed or repeated; the budget stops at the row that crosses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_vlm.data.ledger import EVALUATION_MAX_BAD_FRACTION, TRAINING_MAX_BAD_FRACTION, BadRowBudget, Ledger
from grace_vlm.data.rows import Fault
from grace_vlm.errors import DataError

FIRST = Fault(9, "nine", "empty_answer", "the answer in turn 1 is empty")
SECOND = Fault(2, "zwei \u2603", "image_missing", "'a.png': no such file")
LINES = (
    '{"row": 9, "id": "nine", "kind": "empty_answer", "reason": "the answer in turn 1 is empty"}\n'
    '{"row": 2, "id": "zwei \\u2603", "kind": "image_missing", "reason": "\'a.png\': no such file"}\n'
)


def test_lines_in_the_order_of_finding_and_once_each(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert [ledger.add(fault) for fault in (FIRST, SECOND, FIRST)] == [True, True, False]
    assert ledger.path.read_text() == LINES
    assert ledger.counts() == {"empty_answer": 1, "image_missing": 1}
    resumed = Ledger(ledger.path)
    assert resumed.faults == (FIRST, SECOND)
    assert not resumed.add(SECOND)
    assert ledger.path.read_text() == LINES


def test_a_kill_at_each_byte_ends_in_the_same_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for num_bytes in range(len(LINES) + 1):
        path.write_text(LINES[:num_bytes])
        resumed = Ledger(path)
        for fault in (FIRST, SECOND):
            resumed.add(fault)
        assert path.read_text() == LINES


def test_conversions_are_counted_and_not_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add_conversions(("alpha", "palette"))
    ledger.add_conversions(("alpha",))
    assert ledger.conversions == {"alpha": 2, "palette": 1}
    assert ledger.path.read_text() == ""


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my thesis\n")
    with pytest.raises(DataError) as caught:
        Ledger(path)
    assert str(caught.value) == f"{path} line 1 is no line of a ledger; move the file away"
    assert path.read_text() == "my thesis\n"


@pytest.mark.parametrize(
    ("fraction", "num_rows", "num_allowed"),
    [
        (0.001, 999, 0),
        (0.001, 1_000, 1),
        (0.001, 3_000, 3),
        (0.001, 10_000, 10),
        (0.0, 10**6, 0),
        (1.0, 7, 7),
        (0.29, 100, 29),
    ],
)
def test_the_row_that_crosses_the_budget_stops(fraction: float, num_rows: int, num_allowed: int) -> None:
    budget = BadRowBudget(fraction, num_rows)
    for row in range(num_allowed):
        budget.charge(Fault(row, str(row), "bad_json", "x"))
        budget.charge(Fault(row, str(row), "bad_json", "x"))  # the next epoch
    assert budget.num_bad == num_allowed
    with pytest.raises(DataError):
        budget.charge(Fault(num_allowed, "last", "bad_json", "x"))


def test_the_messages() -> None:
    with pytest.raises(DataError) as caught:
        BadRowBudget(TRAINING_MAX_BAD_FRACTION, 1_500, found=(FIRST,)).charge(SECOND)
    assert str(caught.value) == (
        "row 2 ('zwei \u2603') is bad, image_missing: 'a.png': no such file; 2 bad rows of 1500 are over the budget of "
        "1 (0.001 of the rows); list them with 'grace data check', then repair them or raise data.max_bad_fraction"
    )
    with pytest.raises(DataError) as caught:
        BadRowBudget(EVALUATION_MAX_BAD_FRACTION, 500).charge(FIRST)
    assert str(caught.value) == (
        "row 9 ('nine') is bad, empty_answer: the answer in turn 1 is empty; 1 bad rows of 500 are over the budget of "
        "0 (0 of the rows); list them with 'grace data check', then repair them"
    )
