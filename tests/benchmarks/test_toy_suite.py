"""toy_suite.py: which models are asked, and the rows that are made of their scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import toy_suite  # noqa: E402


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["toy_suite.py", *map(str, words)])
    toy_suite.main()


def test_what_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--demo", tmp_path)
    assert "has no results.json; run grace demo first" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps({"rows": [{"name": "student", "label": "S", "path": "s"}]}))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--demo", tmp_path, "--models", "grace_w4")
    assert "--models has grace_w4; there are student" in capsys.readouterr().err


def test_rows_of_scores(tmp_path: Path) -> None:
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "num_scored": 9, "num_total": 10, "unit": "questions"}
    report = {"headline": "mean", "metrics": {"mean": metric, "other": {}}, "num_unparsed": 2}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": {"lmms": {"mmstar": report}, "card": {}}}))
    (row,) = toy_suite.rows_of(path, "student", "Student")
    assert (row["task"], row["metric"], row["value"], row["unparsed"]) == ("mmstar", "mean", 0.5, 2)
    assert set(row) == set(toy_suite.COLUMNS)
