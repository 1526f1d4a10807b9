"""``--by``: each benchmark's own categories, with intervals, of one evaluation and of several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import write_mmstar

from grace_vlm.errors import ConfigError
from grace_vlm.evals.statistics import wilson_interval
from grace_vlm.evals.suite.categories import category_scores, main_column
from grace_vlm.evals.suite.ledger import Ledger, Reply, read_replies
from grace_vlm.evals.suite.questions import Question
from grace_vlm.evals.suite.run import ask, read_benchmarks, write_scores


class RightBelow:
    """Right on the first rows, wrong on the rest."""

    def __init__(self, num_right: int) -> None:
        self.num_right = num_right

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        for one in questions:
            shift = 0 if int(one.doc_id) < self.num_right else 1
            yield Reply(one.key, one.task, one.doc_id, f"({'ABCD'[(int(one.doc_id) + shift) % 4]})")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("categories")
    write_mmstar(root / "data" / "mmstar", 30)
    board, _ = read_benchmarks(["mmstar"], root / "data")
    found = {"data": root / "data"}
    for name, right in (("base", 21), ("w4", 12)):
        out = root / name
        ask(board, ["strict"], RightBelow(right), Ledger(out, {"model": name}, False))
        write_scores(board, ["strict"], read_replies(out), out, None)
        found[name] = out
    return found


def test_the_main_column() -> None:
    assert main_column(["population", "category", "subcategory"]) == "category"
    assert main_column(["population", "subject", "topic"]) == "subject"
    assert main_column(["discipline", "subject"]) == "discipline"
    assert main_column(["population"]) is None
    assert main_column([]) is None


def test_scores_of_one_column(folders: dict[str, Path]) -> None:
    reports = json.loads((folders["base"] / "scores.json").read_text())["scores"]["strict"]
    found = category_scores(reports, "category")
    assert [(one.column, one.value) for one in found] == [("category", f"c{n}") for n in range(3)]
    # Rows of category c are those whose number leaves c by 3; the first 21 of 30 are right.
    assert [(one.metric["value"], one.metric["num_total"]) for one in found] == [(0.7, 10)] * 3
    assert (found[0].metric["low"], found[0].metric["high"]) == wilson_interval(7, 10)
    assert len(category_scores(reports, "l2_category")) == 6
    assert len(category_scores(reports, "all")) == 9
    with pytest.raises(
        ConfigError, match="--by is topic and no benchmark here has it; expected category, all, l2_category"
    ):
        category_scores(reports, "topic")


def test_the_tables(folders: dict[str, Path], grace: Any) -> None:
    runs = (f"base={folders['base']}", f"w4={folders['w4']}")
    code, out, _ = grace("scores", *runs, "--by", "category")
    assert code == 0
    assert "| benchmark | category | n | base | w4 |" in out
    assert "| MMStar | category: c0 | 10 | **70.0** [39.7, 89.2] | 40.0 [16.8, 68.7] |" in out
    code, out, _ = grace("scores", *runs, "--by", "category", "--format", "csv")
    assert "base,mmstar,category,c1,strict,70.0000,39.6778,89.2209,10,10" in out.splitlines()
    assert out.splitlines()[0].startswith("model,task,column,category,")
    assert len(out.splitlines()) == 7
    rows = json.loads(grace("scores", *runs, "--by", "category", "--json")[1])["rows"]
    assert rows[1]["categories"][2]["category"] == "c2"
    assert rows[1]["categories"][2]["value"] == pytest.approx(40.0)
    assert json.loads(grace("scores", *runs, "--json")[1])["rows"][0]["categories"] == []
    code, _, err = grace("scores", *runs, "--by", "colour")
    assert code == 2
    assert err.startswith("error: --by is colour and no benchmark here has it; expected category, all, l2_category")


def test_by_is_of_a_suite(folders: dict[str, Path], grace: Any) -> None:
    code, _, err = grace("eval", "anything", "--data", folders["data"], "--by", "category")
    assert code == 2
    assert "--by is for a suite" in err
