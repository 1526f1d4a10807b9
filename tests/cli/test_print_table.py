"""A table on the terminal: what is read down a column stands under one another."""

from __future__ import annotations

import pytest

from grace_vlm.cli.output import print_table


def test_words_stand_left_and_numbers_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        ("name", "bits", "change", "note"),
        [("a", "4", "+0.5 %", "ok"), ("bcdef", "16", "nan", "not so"), ("\x1b[31m", "-", "-12", "4 or 5")],
    )
    assert capsys.readouterr().out.splitlines() == [
        "name      bits  change  note",
        "--------  ----  ------  ------",
        "a            4  +0.5 %  ok",
        "bcdef       16     nan  not so",
        "\\x1b[31m     -     -12  4 or 5",
    ]


def test_a_table_without_rows_has_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "bits"), [])
    assert capsys.readouterr().out.splitlines() == ["name  bits", "----  ----"]
    print_table(("name", "note"), [("a", "")])
    assert capsys.readouterr().out.splitlines()[0] == "name  note", "a column of nothing is none of numbers"
