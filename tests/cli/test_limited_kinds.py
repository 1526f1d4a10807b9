"""``grace eval --limit`` is the head of a file; where that has not all kinds, a line says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from toy_run import write_models, write_rows

from grace_vlm.cli.main import main


def test_kinds_that_the_first_rows_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path)
    write_models(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    kinds = ["color"] * 6 + ["shape", "color", "count"] * 6
    rows = [{**row, "kind": kind} for row, kind in zip(rows, kinds, strict=True)]
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def said(*more: object) -> str:
        words = ("eval", tmp_path / "student", "--data", tmp_path / "sorted.jsonl", "--max-new-tokens", 1, *more)
        monkeypatch.setattr(sys, "argv", ["grace", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capsys.readouterr().err

    where = f"{tmp_path}/sorted.jsonl has further on\n"
    assert said("--limit", 5) == f"the first 5 rows (--limit) have none of the kinds count, shape, which {where}"
    assert said("--limit", 7) == f"the first 7 rows (--limit) have none of the kinds count, which {where}"
    assert said("--limit", 9) == ""
    assert said() == ""
