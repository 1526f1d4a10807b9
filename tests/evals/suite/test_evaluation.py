"""Answers to a ledger, scores from it: the same bytes whatever was killed, cut into parts or run together."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from boards import NUM_ROWS, write_mmstar
from worlds import loaded_toy, on_a_cpu

from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.llm import LLM
from grace_vlm.errors import CheckpointError, ConfigError, DataError
from grace_vlm.evals.suite.ledger import Ledger, Reply, read_replies
from grace_vlm.evals.suite.questions import Benchmark, Question
from grace_vlm.evals.suite.responders import EngineResponder, Responder, TransformersResponder
from grace_vlm.evals.suite.run import Part, ask, missing_answers, read_benchmarks, what_is_here, write_scores
from grace_vlm.evals.tasks.task import Docs, Profile

PROFILES: list[Profile] = ["card", "strict"]
IDENTITY = {"model": "toy"}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> list[Benchmark]:
    folder = tmp_path_factory.mktemp("board")
    write_mmstar(folder / "mmstar", broken=5)
    return read_benchmarks(["mmstar"], folder)[0]


@pytest.fixture(scope="module")
def responder() -> EngineResponder:
    options = EngineOptions(cache_tokens=8192, max_running=6, batch_invariant=True)
    return EngineResponder(LLM(loaded_toy("tiny"), options=options))


def evaluate(board: list[Benchmark], by: Responder, out: Path, parts: int = 1) -> tuple[dict[str, bytes], bytes]:
    """(records by name, scores) as bytes."""
    for number in range(parts):
        ask(board, PROFILES, by, Ledger(out, IDENTITY, True, (number, parts)), Part(number, parts))
    replies = read_replies(out)
    assert not missing_answers(board, PROFILES, replies)
    write_scores(board, PROFILES, replies, out, None)
    records = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("records/**/*.jsonl"))}
    return records, (out / "scores.json").read_bytes()


def test_a_run(board: list[Benchmark], responder: EngineResponder, tmp_path: Path) -> None:
    records, scores = evaluate(board, responder, tmp_path)
    assert list(records) == ["records/card/mmstar.jsonl", "records/strict/mmstar.jsonl"]
    lines = [json.loads(line) for line in records["records/strict/mmstar.jsonl"].splitlines()]
    assert [line["id"] for line in lines] == [str(number) for number in range(NUM_ROWS)]
    broken = lines[5]
    assert broken["raw"] is None
    assert broken["status"] == "error"
    assert broken["score"] == 0.0
    assert all(line["raw"] is not None for line in lines if line["id"] != "5")
    metric = json.loads(scores)["scores"]["strict"]["mmstar"]["metrics"]["mean"]
    assert (metric["num_scored"], metric["num_total"]) == (NUM_ROWS - 1, NUM_ROWS)
    assert metric["value"] == pytest.approx(sum(line["score"] for line in lines) / NUM_ROWS)
    kept = [json.loads(line) for line in (tmp_path / "answers.1-of-1.jsonl").read_text().splitlines()]
    assert all(len(line["pictures"]) == 1 and line["seconds"] > 0 for line in kept if "error" not in line)
    assert len({line["pictures"][0] for line in kept if "error" not in line}) == NUM_ROWS // 2


def test_a_prompt_is_asked_once(board: list[Benchmark]) -> None:
    """Profiles that ask alike share an answer; their parsers read the same reply."""
    each = {profile: [q.key for q in board[0].questions([profile])] for profile in ("card", "strict", "lmms", "kit")}
    assert all(len(keys) == NUM_ROWS for keys in each.values())
    together = {question.key for question in board[0].questions(["card", "strict", "lmms", "kit"])}
    assert together == set().union(*each.values())
    assert not set(each["lmms"]) & set(each["kit"])


class Killed(Exception):
    pass


class Fragile:
    """Answers some questions and dies."""

    def __init__(self, by: Responder, most: int) -> None:
        self.by, self.most = by, most

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        for number, reply in enumerate(self.by.answers(questions)):
            if number == self.most:
                raise Killed
            yield reply


def test_what_was_killed_goes_on(board: list[Benchmark], responder: EngineResponder, tmp_path: Path) -> None:
    expected = evaluate(board, responder, tmp_path / "whole")
    out = tmp_path / "killed"
    for _ in range(3):
        with pytest.raises(Killed):
            ask(board, PROFILES, Fragile(responder, 7), Ledger(out, IDENTITY, True))
        with (out / "answers.1-of-1.jsonl").open("a") as file:
            file.write('{"key": "torn by a kill", "te')
    before = sum(reply.text is not None for reply in read_replies(out).values())
    assert 12 < before <= 21, "an error is asked about again each time, an answer never"
    asked: list[str] = []

    class Counted:
        def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
            for reply in responder.answers(questions):
                asked.append(reply.key)
                yield reply

    assert evaluate(board, Counted(), out) == expected
    has_error = sum(reply.text is None for reply in read_replies(out).values())
    assert len(asked) == len(read_replies(out)) - before
    asked.clear()
    assert evaluate(board, Counted(), out) == expected
    assert len(asked) == has_error, "only what has no answer is asked again"


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_are_the_whole(board: list[Benchmark], responder: EngineResponder, tmp_path: Path, parts: int) -> None:
    assert evaluate(board, responder, tmp_path / "parts", parts) == evaluate(board, responder, tmp_path / "whole")
    sizes = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "parts").glob("answers.*"))]
    assert len(sizes) == parts
    assert min(sizes) > 0


def test_the_size_of_a_batch_changes_nothing(board: list[Benchmark], tmp_path: Path) -> None:
    found = []
    for most in (1, 3, 40):
        options = EngineOptions(cache_tokens=8192, max_running=most, max_step_tokens=64, batch_invariant=True)
        by = EngineResponder(LLM(loaded_toy("tiny"), options=options))
        found.append(evaluate(board, by, tmp_path / f"{most}"))
    assert found[0] == found[1] == found[2]


@on_a_cpu
def test_transformers_says_the_same(board: list[Benchmark], tmp_path: Path) -> None:
    loaded = loaded_toy("tiny", seed=1)
    ours = {r.key: r.text for r in EngineResponder(LLM(copy.deepcopy(loaded))).answers(board[0].questions(["strict"]))}
    theirs = TransformersResponder(loaded, batch_size=5).answers(board[0].questions(["strict"]))
    found = {reply.key: reply.text for reply in theirs}
    assert found == ours
    assert sum(text is None for text in found.values()) == 1
    assert len(set(found.values())) > NUM_ROWS // 2


def test_answers_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path, IDENTITY, False).writing() as ledger:
        ledger.add(Reply("k", "mmstar", "1", "B"))
    with pytest.raises(CheckpointError, match="already exists; choose another path or pass --resume"):
        Ledger(tmp_path, IDENTITY, False)
    with pytest.raises(
        CheckpointError, match=r"answers of another evaluation \(model was 'toy', now 'other'\); pass anoth"
    ):
        Ledger(tmp_path, {"model": "other"}, True)
    with (tmp_path / "answers.1-of-1.jsonl").open("a") as file:
        file.write("[1]\n")
    with pytest.raises(DataError, match=r"line 2 is no answer: .*; remove the line"):
        read_replies(tmp_path)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    write_mmstar(tmp_path / "mmstar")
    found, missing = read_benchmarks(["mmstar", "seed"], tmp_path, limit=3)
    assert len(found[0].docs) == 3
    assert missing == ["seed"]
    with pytest.raises(
        ConfigError, match="has no folder seed; give each benchmark's files in a folder of its task's name"
    ):
        read_benchmarks(["mmstar", "seed"], tmp_path, wants_all=True)
    with pytest.raises(ConfigError, match="there is no task 'mmvet'"):
        read_benchmarks(["mmvet"], tmp_path)


def test_benchmarks_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the hub's end is replaced."""
    write_mmstar(tmp_path / "snapshot")
    asked: list[str] = []

    def fetched(name: str, **options: object) -> str:
        asked.append(name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    found, missing = read_benchmarks(["mmstar"], Path("hub"))
    assert (asked, missing) == (["Lin-Chen/MMStar"], [])
    assert len(found[0].docs) == NUM_ROWS
    Path("hub").mkdir()
    with pytest.raises(ConfigError, match="hub has no folder mmstar; "):
        read_benchmarks(["mmstar"], Path("hub"))


def test_a_part_of_a_benchmark_is_said(board: list[Benchmark]) -> None:
    assert what_is_here(board[0], {}) == (
        f"MMStar: {NUM_ROWS} rows are here, published are 1,500 (questions), 6 (categories), 18 (sub-categories)"
    )
    docs = board[0].docs.docs
    whole = tuple(dataclasses.replace(docs[0], id=str(number)) for number in range(1500))
    assert what_is_here(dataclasses.replace(board[0], docs=Docs(whole)), {}) is None
    said = f"MMStar: {NUM_ROWS} rows are here, the toy suite has {NUM_ROWS + 1}"
    assert what_is_here(board[0], {"mmstar": NUM_ROWS + 1}) == said
    assert what_is_here(board[0], {"mmstar": NUM_ROWS}) is None


def test_answers_of_other_files_and_options_are_refused(grace: Any, tmp_path: Path) -> None:
    write_mmstar(tmp_path / "data" / "mmstar")
    model = ROOT / "assets" / "toy-student"
    words = ("eval", model, "--suite", "card", "--task", "mmstar", "--out", tmp_path / "out", "--data")
    code, _, said = grace(*words, tmp_path / "data")
    assert code == 0
    assert f"MMStar: {NUM_ROWS} rows are here, published are 1,500 (questions)" in said
    code, _, said = grace(*words, tmp_path / "data", "--resume", "--max-new-tokens", 1)
    assert code == 5
    assert "has answers of another evaluation (max_new_tokens was None, now 1); pass another --out" in said
    write_mmstar(tmp_path / "other" / "mmstar", broken=5)
    before = (tmp_path / "out" / "scores.json").read_bytes()
    code, _, said = grace(*words, tmp_path / "other", "--resume")
    assert code == 2
    assert f"has answers to {NUM_ROWS} questions of mmstar that {tmp_path / 'other'} does not ask: its files" in said
    assert (tmp_path / "out" / "scores.json").read_bytes() == before
    assert grace(*words, tmp_path / "data", "--resume")[0] == 0
    before = (tmp_path / "out" / "scores.json").read_bytes()
    code, _, said = grace(*words, tmp_path / "data", "--resume", "--limit", 1)
    assert code == 2
    assert (
        said == f"error: {tmp_path / 'out'} has scores of all rows, which --limit 1 would replace; pass another --out\n"
    )
    assert (tmp_path / "out" / "scores.json").read_bytes() == before
    twice = ("--task", "mmstar", "--limit", 2, "--out", tmp_path / "twice")
    assert grace(*words, tmp_path / "data", *twice)[0] == 0, "a task that is said twice is asked once"
