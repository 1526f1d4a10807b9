"""A user error is one line, whatever a stranger's file made it name."""

from __future__ import annotations

import pytest

from grace_vlm.errors import FormatError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("tensor a is missing", "tensor a is missing"),
        ("tensor é ∑ 漢 is missing", "tensor é ∑ 漢 is missing"),
        ("tensor a\nerror: b is missing", r"tensor a\nerror: b is missing"),
        ("\x1b[31m\0\ud800\u202e\U000e0001", r"\x1b[31m\x00\ud800\u202e\U000e0001"),
        ("x" * 4001, "x" * 4000 + "... (4,001 characters)"),
        ("", ""),
    ],
)
def test_an_error_is_one_line(given: str, shown: str) -> None:
    assert str(FormatError(given)) == shown
