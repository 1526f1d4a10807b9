"""Training rows in the kinds of the toy suite: they are asked as ``grace eval`` asks, answered as it wants, and none
shows what the suite shows."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest

from grace_vlm.data.sources.world.drawn import Drawn
from grace_vlm.evals.suite.questions import picture_bytes
from grace_vlm.evals.suite.run import read_benchmarks
from grace_vlm.evals.tasks.registry import TASKS, task_named
from grace_vlm.evals.tasks.task import PROFILES
from grace_vlm.evals.toy import rows
from grace_vlm.evals.toy.rows import SuiteSource
from grace_vlm.evals.toy.suite import BENCHMARKS, write_toy_suite


@pytest.fixture(scope="module")
def source() -> SuiteSource:
    return SuiteSource(seed=3)


@pytest.fixture(scope="module")
def units(source: SuiteSource) -> list[list[Drawn]]:
    return [source.unit("train", number) for number in range(7)]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_unit_is_a_part_of_what_grace_eval_asks_of_the_suite_of_its_seed(
    units: list[list[Drawn]], tmp_path: Path
) -> None:
    write_toy_suite(tmp_path / "suite", rows.FIRST_SEED + 3_000)
    asked: dict[str, set[tuple[str, tuple[str, ...]]]] = {}
    for name in (*BENCHMARKS, "ai2d_no_mask"):
        folder = tmp_path / "suite" / name.removesuffix("_no_mask")
        if not (tmp_path / "suite" / name).exists():
            (tmp_path / "suite" / name).symlink_to(folder)
        (benchmark,), _ = read_benchmarks([name], tmp_path / "suite")
        found = asked.setdefault(f"suite_{name.removesuffix('_no_mask')}", set())
        for question in benchmark.questions(PROFILES):
            text = question.text.replace("[picture]", "<image>")
            text = text.removeprefix("<image>" * len(picture_bytes(question)))
            found.add((text.strip(), tuple(map(digest, picture_bytes(question)))))
    kinds: Counter[str] = Counter()
    for drawn in (one for unit in units for one in unit):
        images = tuple(map(digest, drawn.images))
        for question in drawn.questions:
            kinds[question.kind] += 1
            assert (question.text, images) in asked[question.kind], question
    assert set(kinds) == {f"suite_{name}" for name in BENCHMARKS}
    assert min(kinds.values()) >= 20


def test_the_answers_are_right_by_every_profile(source: SuiteSource) -> None:
    checked: Counter[str] = Counter()
    for benchmark in BENCHMARKS:
        for task, doc in rows._docs(benchmark, rows.FIRST_SEED):
            said = rows.answer(doc)
            for profile in task.about.profiles:
                extract = task.extract(said, doc, profile)
                if profile == "kit" and doc.kind == "open":
                    continue  # it makes a choice of the gold answer and "Other Answers", for a judge to make
                if task.about.name == "mmmu" and profile in ("card", "lmms") and doc.gold.startswith("["):
                    continue  # a list of answers is one text to them
                assert task.score(doc, extract, profile) == 1.0, (task.about.name, profile, doc.gold, said)
                checked[task.about.name] += 1
    assert set(checked) == {*BENCHMARKS, "ai2d_no_mask"} <= set(TASKS)
    assert task_named("mmmu").about.name == "mmmu"


def test_no_picture_of_the_suite_and_none_of_the_other_split(source: SuiteSource, tmp_path: Path) -> None:
    shown = {
        split: {digest(image) for number in range(14) for one in source.unit(split, number) for image in one.images}
        for split in ("train", "test")
    }
    assert min(len(found) for found in shown.values()) > 100
    write_toy_suite(tmp_path / "suite", 0)
    benchmarks, _ = read_benchmarks(list(BENCHMARKS), tmp_path / "suite")
    of_suite = {digest(picture.load()) for one in benchmarks for doc in one.docs for picture in doc.images}
    assert not shown["train"] & of_suite
    assert not shown["test"] & of_suite
    assert len(shown["train"] & shown["test"]) <= 2  # the mix leaves those out
    questions = [question for number in range(14) for one in source.unit("train", number) for question in one.questions]
    forms = Counter(question.form for question in questions)
    assert min(forms[form] for form in ("choice", "yes_no", "open")) >= 10


def test_a_unit_hangs_on_its_number_alone(source: SuiteSource, units: list[list[Drawn]]) -> None:
    again = SuiteSource(seed=3)
    order = list(range(7))
    random.Random(0).shuffle(order)
    for number in order:
        assert again.unit("train", number) == units[number]
    assert source.unit("train", 7) != units[0]
    assert SuiteSource(seed=4).unit("train", 0) != units[0]
