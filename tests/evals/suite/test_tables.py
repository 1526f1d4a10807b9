"""The table of several evaluations, and what one lost against another, by the commands that print them."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import write_mmstar

from grace_vlm.cli.main import main
from grace_vlm.errors import ConfigError
from grace_vlm.evals.suite.ledger import Ledger, Reply, read_replies
from grace_vlm.evals.suite.paired import difference, read_records, require_same_data
from grace_vlm.evals.suite.questions import Question
from grace_vlm.evals.suite.run import ask, read_benchmarks, write_scores
from grace_vlm.evals.suite.tables import FORMATS, Cell, read_line, table

STUDENT = Path(__file__).parents[3] / "assets" / "toy-student"


class Scripted:
    """Right on the rows that it is told, else a wrong letter."""

    def __init__(self, right: range) -> None:
        self.right = right

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        for one in questions:
            shift = 0 if int(one.doc_id) in self.right else 1
            yield Reply(one.key, one.task, one.doc_id, f"({'ABCD'[(int(one.doc_id) + shift) % 4]})")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three evaluations of forty rows: 30, 24 and 38 right."""
    root = tmp_path_factory.mktemp("tables")
    write_mmstar(root / "data" / "mmstar", 40)
    board, _ = read_benchmarks(["mmstar"], root / "data")
    found = {}
    for name, right in (("base", range(30)), ("w4", range(4, 28)), ("teacher", range(38))):
        out = root / name
        ask(board, ["strict"], Scripted(right), Ledger(out, {"model": name}, False))
        write_scores(board, ["strict"], read_replies(out), out, None)
        found[name] = out
    return found


def test_the_formats(folders: dict[str, Path]) -> None:
    lines = [read_line(folders[name], f"{name}_&", "strict", name == "teacher") for name in ("base", "w4", "teacher")]
    texts = {form: table(lines, "strict", form) for form in FORMATS}
    assert texts["markdown"].splitlines()[2:5] == [
        "| teacher_& | 95.0 [83.5, 98.6] |", "| base_& | **75.0** [59.8, 85.8] |", "| w4_& | 60.0 [44.6, 73.7] |",
    ]  # fmt: skip
    assert "profile strict" in texts["markdown"]
    assert "base\\_\\& & \\textbf{75.0} {\\small [59.8, 85.8]}" in texts["latex"]
    assert "<td>base_&amp;</td><td><b>75.0</b> <small>[59.8, 85.8]</small></td>" in texts["html"]
    assert texts["csv"].splitlines()[2].startswith("base_&,mmstar,strict,mean,75.0000,")
    with pytest.raises(ConfigError, match="--format is pdf; expected one of markdown, latex, csv, html"):
        table(lines, "strict", "pdf")
    with pytest.raises(
        ConfigError, match="has scores of strict; pass --profile strict, or run grace eval with --profile kit"
    ):
        read_line(folders["base"], "base", "kit")


def test_other_numbers_of_rows_are_said_and_nothing_is_best(folders: dict[str, Path], tmp_path: Path) -> None:
    write_mmstar(tmp_path / "data" / "mmstar", 40)
    board, _ = read_benchmarks(["mmstar"], tmp_path / "data", limit=5)
    ask(board, ["strict"], Scripted(range(40)), Ledger(tmp_path / "short", {}, False))
    write_scores(board, ["strict"], read_replies(tmp_path / "short"), tmp_path / "short", 5)
    lines = [read_line(folder, folder.name, "strict") for folder in (folders["base"], tmp_path / "short")]
    assert table(lines, "strict", "markdown").splitlines()[:4] == [
        "| model | MMStar mean |",
        "| --- | --- |",
        "| base | 75.0 [59.8, 85.8] |",
        "| short [first 5 rows] | 100.0 [56.6, 100.0] (5 of 40) |",
    ]
    none = dataclasses.replace(lines[0], cells={"mmstar": Cell(0.0, 0.0, 100.0, 0, 0)})
    assert "| base | - |" in table([none], "strict", "markdown")


def test_differences(folders: dict[str, Path]) -> None:
    own, base = (read_records(folders[name], "strict")["mmstar"] for name in ("w4", "base"))
    found = difference("mmstar", own, base)
    assert found.mean == pytest.approx(-6 / 40)
    assert found.lost == tuple(str(number) for number in (*range(4), 28, 29))
    assert found.won == ()
    assert found.p_value == pytest.approx(2 * 0.5**6)
    assert found.low < found.mean < found.high <= 0
    assert found.disagreement == pytest.approx(6 / 40)
    with pytest.raises(ConfigError, match=r"evaluations of mmstar have different rows \(39 and 40\); run both alike"):
        difference("mmstar", own[1:], base)


def test_the_command(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def grace(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["grace", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    runs = [f"base={folders['base']}", f"w4={folders['w4']}", "--reference", f"teacher={folders['teacher']}"]
    code, out, _ = grace("scores", *runs, "--baseline", "base")
    assert code == 0
    assert "| base | **75.0** [59.8, 85.8] |" in out
    assert "w4 against base, profile strict:" in out
    assert "-15.00 [" in out
    assert "6 / 0" in out
    code, out, _ = grace("scores", *runs, "--baseline", "base", "--json")
    found = json.loads(out)
    assert found["differences"]["w4"][0]["holm"] == pytest.approx(0.03125)
    code, out, _ = grace("scores", *runs, "--baseline", "base", "--format", "csv")
    head, *rows = csv.reader(out.splitlines())
    assert dict(zip(head, rows[0], strict=True)) | {"p_value": "", "low": "", "high": "", "disagreement": ""} == {
        "model": "w4", "baseline": "base", "task": "mmstar", "profile": "strict", "num_rows": "40", "mean": "-0.15",
        "low": "", "high": "", "p_value": "", "holm": "0.03125", "disagreement": "", "lost": "6", "won": "0",
    }  # fmt: skip
    assert len(rows) == 1
    out = grace("scores", *runs, "--baseline", "base", "--format", "latex")[1]
    assert out.count("\\begin{tabular}") == out.count("\\end{tabular}") == 2
    assert "% w4 against base, profile strict" in out
    out = grace("scores", *runs, "--baseline", "base", "--format", "html")[1]
    assert "<caption>w4 against base, profile strict</caption>" in out
    code, _, err = grace("scores", *runs, "--baseline", "base", "--by", "category", "--format", "csv")
    assert (code, err) == (2, "error: --by and --baseline are a csv each; leave one out, or take another --format\n")
    code, _, err = grace("scores", *runs, "--profile", "lmms", "--profile", "strict")
    assert err == "error: --profile is given 2 times (lmms, strict); numbers of one stand together\n"
    code, _, err = grace("scores", *runs, "--baseline", "w8")
    assert code == 2
    assert err == "error: --baseline is w8; expected one of base, w4\n"
    twice = f"error: 2 runs are named w4 ({folders['base']}, {folders['w4']}); give each its own, NAME=FOLDER\n"
    given = f"w4={folders['base']}", f"w4={folders['w4']}"
    assert grace("scores", *given, "--baseline", "w4") == (2, "", twice)
    assert grace("scores", *given) == (2, "", twice)
    assert grace("scores", given[0], "--reference", given[1]) == (2, "", twice)
    code, _, err = grace("scores", f"a={folders['base']}", "--baseline", "a")
    assert code == 2
    assert "compares several runs and one was given" in err
    code, _, err = grace("scores", f"a={folders['base']}", "--profile", "fair")
    assert err == "error: --profile is fair; expected one of card, lmms, kit, strict\n"
    code, _, err = grace("scores", folders["base"].parent)
    assert code == 2
    assert "has no scores.json; expected what grace eval MODEL --suite card --data DIR --out DIR wrote" in err
    code, _, err = grace("scores", STUDENT)
    assert code == 2
    assert err.startswith(f"error: {STUDENT} is a model; expected what grace eval MODEL")
    code, _, err = grace("scores", folders["base"] / "nowhere")
    assert code == 2
    assert "nowhere is no folder; expected what grace eval MODEL" in err
    (folders["base"].parent / "scores.json").write_text("{")
    code, _, err = grace("scores", folders["base"].parent)
    assert code == 2
    assert "has no readable scores.json (Expecting" in err


def test_other_files_are_not_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    write_mmstar(tmp_path / "data" / "mmstar", 39)
    board, _ = read_benchmarks(["mmstar"], tmp_path / "data")
    ask(board, ["strict"], Scripted(range(9)), Ledger(tmp_path / "other", {}, False))
    write_scores(board, ["strict"], read_replies(tmp_path / "other"), tmp_path / "other", None)
    require_same_data(folders["w4"], folders["base"], ["mmstar"])
    with pytest.raises(ConfigError, match=r"are of different mmstar files .*; ask both on the same --data with the"):
        require_same_data(tmp_path / "other", folders["base"], ["mmstar"])


def test_scores_of_before_stay_if_they_are_of_the_same_rows(tmp_path: Path) -> None:
    write_mmstar(tmp_path / "mmstar", 12)
    board, _ = read_benchmarks(["mmstar"], tmp_path)
    out = tmp_path / "out"
    for profile in ("strict", "kit"):
        ask(board, [profile], Scripted(range(5)), Ledger(out, {}, True))  # type: ignore[list-item]
        write_scores(board, [profile], read_replies(out), out, None)  # type: ignore[list-item]
    assert set(json.loads((out / "scores.json").read_text())["scores"]) == {"strict", "kit"}
    few, _ = read_benchmarks(["mmstar"], tmp_path, limit=6)
    write_scores(few, ["kit"], read_replies(out), out, 6)
    content = json.loads((out / "scores.json").read_text())
    assert set(content["scores"]) == {"kit"}, "the others were of twelve rows"
    assert content["data"]["mmstar"].endswith(" 6 rows")
