"""How far the binned R2 moves with rows: what docs/analyze.md says is what the script finds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "analyze_rows", raising=False)
    import analyze_rows

    return analyze_rows


def test_the_page_says_what_was_drawn(script: Any) -> None:
    page = (ROOT / "docs" / "analyze.md").read_text(encoding="utf-8")
    for num_rows, kind in (
        (512, "equal_widths"),
        (2400, "equal_widths"),
        (2400, "equal_counts"),
        (512, "equal_counts"),
    ):
        low, high, _ = script.middle(num_rows, kind)
        told = f"{low:.2f} to {high:.2f}".replace("0.", ".")
        assert told in page, (num_rows, kind, told)
    assert script.middle(256, "equal_widths")[2] == pytest.approx(0.2, abs=0.02), "a fifth of the draws"


def test_bins_that_are_full_move_little(script: Any) -> None:
    low, high, without = script.middle(1_000_000, "equal_widths")
    assert high - low < 0.02
    assert low < 0.879 < high, "the R2 of the bins themselves"
    assert without == 0
