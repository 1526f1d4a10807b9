"""Controls ask what they say, are named wherever they are shown, and never mix with a model's answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import write_mmstar

from grace_vlm.errors import ConfigError
from grace_vlm.evals.suite.controls import MajorityResponder, controlled
from grace_vlm.evals.suite.ledger import Ledger, Reply, read_replies
from grace_vlm.evals.suite.paired import cluster_of
from grace_vlm.evals.suite.questions import Benchmark, Question, picture_bytes
from grace_vlm.evals.suite.run import ask, read_benchmarks, write_scores
from grace_vlm.evals.toy.suite import write_toy_suite


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Benchmark]:
    folder = tmp_path_factory.mktemp("controls") / "suite"
    write_toy_suite(folder, seed=0)
    names = ["hallusion", "mmbench", "scienceqa", "ai2d", "mmmu", "seed", "mmstar"]
    return {one.task.about.name: one for one in read_benchmarks(names, folder)[0]}


def texts(question: Question) -> str:
    return "".join(part for part in question.parts if isinstance(part, str))


def test_blind_has_the_texts_and_no_picture(toys: dict[str, Benchmark]) -> None:
    for name, one in toys.items():
        blind = controlled(one, "blind")
        for doc in one.docs:
            plain, other = one.question(doc, "strict"), blind.question(doc, "strict")
            assert texts(other) == texts(plain) == other.text
            assert other.key != plain.key, name


def test_shuffled_pictures_are_of_unrelated_rows(toys: dict[str, Benchmark]) -> None:
    for name, one in toys.items():
        shuffled = controlled(one, "shuffle", seed=3)
        owners: dict[bytes, set[str]] = {}
        for doc in one.docs:
            for picture in doc.images:
                owners.setdefault(picture.load(), set()).add(cluster_of(one.task.groups(doc), doc.id))
        moved = 0
        for doc in one.docs:
            plain, other = one.question(doc, "strict"), shuffled.question(doc, "strict")
            assert other.text == plain.text
            for before, after in zip(picture_bytes(plain), picture_bytes(other), strict=True):
                assert owners[after] - {cluster_of(one.task.groups(doc), doc.id)}, (
                    f"{name} {doc.id} keeps its own picture"
                )
                moved += before != after
        assert moved > 0.9 * sum(bool(doc.images) for doc in one.docs)
        again, elsewhere = controlled(one, "shuffle", seed=3), controlled(one, "shuffle", seed=4)
        keys = [[b.question(doc, "strict").key for doc in one.docs] for b in (shuffled, again, elsewhere)]
        assert keys[0] == keys[1] != keys[2]


def test_majority_is_the_most_frequent_answer(toys: dict[str, Benchmark]) -> None:
    for name in ("scienceqa", "ai2d", "hallusion", "mmmu"):
        one = controlled(toys[name], "majority")
        docs = list(one.docs)
        said = {r.doc: r.text for r in MajorityResponder([one]).answers(one.questions(["strict"]))}
        assert len(said) == len(docs)
        for kind in {doc.kind for doc in docs}:
            counts = Counter(doc.gold for doc in docs if doc.kind == kind)
            for doc in docs:
                if doc.kind == kind:
                    possible = set(doc.options) or set(counts)
                    assert counts[said[doc.id] or ""] == max(counts[answer] for answer in possible)
                    assert said[doc.id] in possible


def test_no_such_control(toys: dict[str, Benchmark]) -> None:
    with pytest.raises(ConfigError, match="--control is deaf; expected one of blind, shuffle, majority"):
        controlled(toys["mmstar"], "deaf")


def test_nothing_to_exchange(tmp_path: Path) -> None:
    write_mmstar(tmp_path / "mmstar", 1)
    board, _ = read_benchmarks(["mmstar"], tmp_path)
    with pytest.raises(ConfigError, match="MMStar has no two unrelated rows with pictures to exchange; leave out --co"):
        controlled(board[0], "shuffle")


class Right:
    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        for one in questions:
            yield Reply(one.key, one.task, one.doc_id, f"({'ABCD'[int(one.doc_id) % 4]})")


def test_a_control_is_named_everywhere_and_kept_apart(grace: Any, tmp_path: Path) -> None:
    write_mmstar(tmp_path / "data" / "mmstar", 20)
    board, _ = read_benchmarks(["mmstar"], tmp_path / "data")
    real, control = tmp_path / "real", tmp_path / "control"
    ask(board, ["strict"], Right(), Ledger(real, {"model": "m"}, False))
    write_scores(board, ["strict"], read_replies(real), real, None)
    args = (
        "eval",
        "no-model-is-opened",
        "--suite",
        "card",
        "--data",
        tmp_path / "data",
        "--control",
        "majority",
        "--out",
    )
    code, out, _ = grace(*args, control)
    assert code == 0
    assert "MMStar [control: majority]*" in out
    assert "of the control majority: no score of a model, but what one is to be compared with" in out
    assert "25.0 [" in out, "five of twenty are A"
    assert json.loads(grace(*args, control, "--resume", "--json")[1])["control"] == "majority"
    assert json.loads((control / "run.json").read_text())["control"] == "majority"
    assert json.loads((control / "scores.json").read_text())["run"]["control"] == "majority"
    lines = [json.loads(line) for line in (control / "records" / "strict" / "mmstar.jsonl").read_text().splitlines()]
    assert {line["control"] for line in lines} == {"majority"}
    lines = [json.loads(line) for line in (real / "records" / "strict" / "mmstar.jsonl").read_text().splitlines()]
    assert not any("control" in line for line in lines)
    code, out, _ = grace("scores", f"m={real}", f"most={control}", "--baseline", "m")
    assert "| most [control: majority] | 25.0 [" in out
    assert "| m | 100.0 [" in out
    assert "most [control: majority] against m, profile strict:" in out
    assert grace("compare", real, control, "--out", tmp_path / "flips")[0] == 0
    assert "<h1>control [control: majority] against real</h1>" in (tmp_path / "flips" / "flips.html").read_text()
    code, _, err = grace(*args, real, "--resume")
    assert code == 5
    assert "has answers of another evaluation" in err
    assert "control was None, now 'majority'" in err


@pytest.mark.parametrize(
    "flag", [("--control", "blind"), ("--profile", "lmms"), ("--part", "2/4"), ("--resume",), ("--transformers",)]
)
def test_what_is_of_a_suite(grace: Any, tmp_path: Path, flag: tuple[str, ...]) -> None:
    code, _, err = grace("eval", "m", "--data", tmp_path, *flag)
    assert (code, err) == (2, f"error: {flag[0]} is for a suite; pass --suite card, or leave it out\n")


def test_a_folder_without_a_suite_is_said(grace: Any, tmp_path: Path) -> None:
    code, _, err = grace("eval", "m", "--data", tmp_path)
    assert (code, err) == (
        2, f"error: --data is {tmp_path}, a folder; expected a file of rows, or with --suite a folder of benchmarks\n"
    )  # fmt: skip
    (tmp_path / "mmstar").mkdir()
    code, _, err = grace("eval", "m", "--data", tmp_path)
    assert (code, err) == (
        2,
        f"error: --data is {tmp_path}, a folder of benchmarks (mmstar); pass --suite card and --out to ask them\n",
    )
