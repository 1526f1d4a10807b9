"""``grace compare`` on two evaluations: every row that turned, counted by task and category, shown with its picture."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from boards import write_mmstar
from PIL import Image

from grace_vlm.evals.statistics import mcnemar_p
from grace_vlm.evals.suite.flips import Flip, Side, compare_suites
from grace_vlm.evals.suite.flips_page import chosen
from grace_vlm.evals.suite.ledger import Ledger, Reply, read_replies
from grace_vlm.evals.suite.questions import Question
from grace_vlm.evals.suite.responders import opened
from grace_vlm.evals.suite.run import ask, read_benchmarks, write_scores

EVIL = "<script>alert(1)</script>"


class RightOn:
    """Right on the rows that it is told; a wrong reply is markup with a wrong letter, and one is no letter at all."""

    def __init__(self, right: set[int]) -> None:
        self.right = right

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        for one in questions:
            number, ready = int(one.doc_id), opened(one)
            assert not isinstance(ready, Reply)
            wrong = "I cannot say" if number == 1 else f"({'ABCD'[(number + 1) % 4]}) {EVIL}"
            yield ready.reply(f"({'ABCD'[number % 4]})" if number in self.right else wrong, None, None, None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of thirty rows 0 to 19 are right before; 6 to 21 and 24 after: six lost, three won."""
    root = tmp_path_factory.mktemp("flips")
    write_mmstar(root / "data" / "mmstar", 30)
    board, _ = read_benchmarks(["mmstar"], root / "data")
    for name, right in (("before", set(range(20))), ("after", {*range(6, 22), 24})):
        ask(board, ["strict"], RightOn(right), Ledger(root / name, {"model": name}, False))
        write_scores(board, ["strict"], read_replies(root / name), root / name, None)
    return root


class Page(HTMLParser):
    """Tags, sources of pictures and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_turned(world: Path) -> None:
    found = compare_suites(world / "before", world / "after", "strict")
    turned = {flip.id: flip.turn for flip in found.flips}
    assert turned == {**{str(n): "lost" for n in range(6)}, "20": "won", "21": "won", "24": "won"}
    whole, *categories = found.counts
    assert (whole.category, whole.num_rows, whole.num_lost, whole.num_won) == (None, 30, 6, 3)
    assert whole.p_value == pytest.approx(mcnemar_p([True] * 6 + [False] * 3, [False] * 6 + [True] * 3))
    assert [(c.category, c.num_rows, c.num_lost, c.num_won) for c in categories] == [
        ("c0", 10, 2, 2), ("c1", 10, 2, 0), ("c2", 10, 2, 1),
    ]  # fmt: skip
    first = found.flips[1]
    assert (first.gold, first.base, first.own) == (
        "B",
        Side("(B)", "B", first.base.rule),
        Side("I cannot say", None, "denied"),
    )
    mirrored = compare_suites(world / "after", world / "before", "strict")
    assert (mirrored.counts[0].num_lost, mirrored.counts[0].num_won) == (3, 6)


def test_the_command_with_pictures(world: Path, grace: Any, tmp_path: Path) -> None:
    args = ("compare", world / "before", world / "after", "--out", tmp_path)
    code, out, err = grace(*args, "--data", world / "data")
    assert (code, err) == (0, "")
    assert "MMStar                 30     6    3      0.508" in out
    assert "  c1                   10     2    0      0.500" in out
    lines = [json.loads(line) for line in (tmp_path / "flips.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert lines[0]["prompt"].startswith("[picture]Question: What is number 0?\nLook well.\nOptions:\n(A) red\n")
    assert (lines[0]["base"]["raw"], lines[0]["own"]["raw"]) == ("(A)", f"(B) {EVIL}")
    assert lines[0]["gold"] == "A"
    counts = json.loads((tmp_path / "flips.json").read_text())
    assert counts["differences"][0]["holm"] == counts["counts"][0]["p_value"]
    page = Page((tmp_path / "flips.html").read_text())
    assert "script" not in page.tags
    assert EVIL in page.text
    assert "9 of 9 rows that turned" in page.text
    assert "What is number 24?" in page.text
    assert len(page.sources) == 9
    with (world / "data" / "mmstar" / "MMStar.tsv").open(newline="") as file:
        stored = list(csv.DictReader(file, delimiter="\t"))
    shown, own = (Image.open(io.BytesIO(data)).convert("RGB") for data in (
        base64.b64decode(page.sources[3].partition(",")[2]), base64.b64decode(stored[3]["image"]),
    ))  # fmt: skip
    assert shown.tobytes() == own.tobytes(), "row 3 is shown with its own picture"


def test_the_command_without_pictures(world: Path, grace: Any, tmp_path: Path) -> None:
    code, out, err = grace("compare", world / "before", world / "after", "--out", tmp_path)
    assert code == 0
    assert err == "prompts and pictures are left out of the page; give --data, the folder of the benchmarks\n"
    page = Page((tmp_path / "flips.html").read_text())
    assert page.sources == []
    assert "What is number 3?\nLook well.\nA. red\nB. blue" in page.text
    assert json.loads((tmp_path / "flips.jsonl").read_text().splitlines()[0])["prompt"] is None
    assert f"page: {tmp_path / 'flips.html'}" in out


def test_the_baseline_may_be_the_second(world: Path, grace: Any, tmp_path: Path) -> None:
    args = ("compare", world / "before", world / "after", "--out", tmp_path, "--json")
    found = json.loads(grace(*args, "--baseline", "after")[1])
    assert (found["counts"][0]["num_lost"], found["counts"][0]["num_won"]) == (3, 6)
    code, _, err = grace(*args, "--baseline", "w8")
    assert (code, err) == (2, "error: --baseline is w8; expected before or after\n")


def test_an_evaluation_and_itself(world: Path, grace: Any, tmp_path: Path) -> None:
    code, _, _ = grace("compare", world / "after", world / "after", "--data", world / "data", "--out", tmp_path)
    assert code == 0
    assert (tmp_path / "flips.jsonl").read_text() == ""
    assert "0 of 0 rows that turned" in Page((tmp_path / "flips.html").read_text()).text


def test_other_files_are_refused_or_their_pictures_left_out(world: Path, grace: Any, tmp_path: Path) -> None:
    path = write_mmstar(tmp_path / "data" / "mmstar", 30) / "MMStar.tsv"
    args = ("compare", world / "before", world / "after", "--out", tmp_path / "out", "--data", tmp_path / "data")
    text = path.read_text()
    path.write_text(text.replace("What is number 2?", "Which is number 2?"))
    code, _, err = grace(*args)
    assert code == 2
    assert "does not ask row 2 of mmstar as" in err
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    path.write_text(text.replace(rows[4]["image"], rows[20]["image"]))
    assert grace(*args)[0] == 0
    page = Page((tmp_path / "out" / "flips.html").read_text())
    assert page.text.count("picture left out: the file has another one now than was asked about") == 2
    assert len(page.sources) == 7


def test_errors(world: Path, grace: Any, tmp_path: Path) -> None:
    before, after = world / "before", world / "after"
    code, _, err = grace("compare", before, after, before)
    assert (code, err) == (
        2, "error: 3 folders were given; evaluations are compared two at a time: base, then other\n",
    )  # fmt: skip
    assert grace("compare", before)[2].startswith("error: 1 folders were given; ")
    code, _, err = grace("compare", before, after, "--profile", "fair")
    assert (code, err) == (2, "error: --profile is fair; expected one of card, lmms, kit, strict\n")
    code, _, err = grace("compare", before, after, "--profile", "kit")
    assert (code, err) == (
        2,
        f"error: {before} has no records of the profile kit (but of: strict); pass one of those as --profile, or run "
        "grace eval --suite with it first\n",
    )
    code, _, err = grace("compare", before, tmp_path)
    assert (code, err) == (
        2,
        f"error: {tmp_path} is no evaluation (no run.json); expected what grace eval MODEL --suite --out wrote\n",
    )


def test_a_page_shows_some_of_many() -> None:
    side = Side("a", "A", "whole")
    many = [
        Flip(task, str(n), turn, "", "q", {}, "A", None, (), side, side)
        for task, turn, count in (("mmstar", "lost", 300), ("seed", "won", 5), ("seed", "lost", 90))
        for n in range(count)
    ]
    many = [Flip(**{**vars(flip), "id": f"{flip.turn}{flip.id}"}) for flip in many]
    found = chosen(many, 100)
    assert len(found) == 100
    assert [sum((f.task, f.turn) == kind for f in found) for kind in (("seed", "won"), ("seed", "lost"))] == [5, 47]
    assert found == [flip for flip in many if flip in found], "in the order of the rows"
    assert chosen(many[:7], 100) == many[:7]
