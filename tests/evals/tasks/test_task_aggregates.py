"""Aggregates of cases small enough to count by hand, and every task's scorer on constructed replies."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import task_files
from hypothesis import given, settings
from hypothesis import strategies as st
from task_files import WRITERS

from grace_vlm.evals.statistics import wilson_interval
from grace_vlm.evals.tasks.aggregate import groups_right
from grace_vlm.evals.tasks.registry import TASKS
from grace_vlm.evals.tasks.task import Doc, Profile, Record, Report, failed_record, record_of


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Doc]]:
    return {name: list(TASKS[name].docs(WRITERS[name](tmp_path_factory.mktemp(name)))) for name in TASKS}


def report_of(name: str, docs: list[Doc], replies: list[str | None], profile: Profile) -> Report:
    task = TASKS[name]
    records = [
        failed_record(task, doc, "out of memory") if reply is None else record_of(task, doc, reply, profile)
        for doc, reply in zip(docs, replies, strict=True)
    ]
    return task.aggregate(records, profile)


def values(report: Report) -> dict[str, float]:
    return {name: metric.value for name, metric in report.metrics.items()}


def test_hallusion_groups(questions: Mapping[str, list[Doc]]) -> None:
    """Seven rows. Wrong: the second figure's first question, and the text row.

    Figures: 0 of VD is right, 1 is not, both of VS are: 3 of 4. Questions: 0 of VD is wrong on figure 1, 1 is right,
    0 of VS is right on its figures and wrong without one: 1 of 3 with the text row, 2 of 3 without.
    """
    replies = ["Yes", "No", "Yes", "Yes", "Yes", "No", "No"]
    report = report_of("hallusion", questions["hallusion"], replies, "strict")
    assert values(report) == pytest.approx(
        {
            "aAcc": 5 / 7,
            "fAcc": 3 / 4,
            "qAcc": 1 / 3,
            "mean": (5 / 7 + 3 / 4 + 1 / 3) / 3,
            "aAcc image": 5 / 6,
            "fAcc image": 3 / 4,
            "qAcc image": 2 / 3,
            "mean image": (5 / 6 + 3 / 4 + 2 / 3) / 3,
        }
    )
    assert report.headline == "mean image"
    assert report.metrics["fAcc"].num_total == 4
    assert report.metrics["qAcc"].num_total == 3
    assert {name: one.value for name, one in report.breakdown["population"].items()} == {"image": 5 / 6, "text": 0.0}
    assert report.breakdown["category"]["VD"].value == 3 / 4
    assert report_of("hallusion", questions["hallusion"], replies, "card").headline == "aAcc"
    assert report_of("hallusion", questions["hallusion"], replies, "kit").headline == "mean image"


def test_groups_of_one_set_are_one_cluster(questions: Mapping[str, list[Doc]]) -> None:
    """Figures and questions cross inside a set: what is drawn is the set."""
    task = TASKS["hallusion"]
    records = [record_of(task, doc, "Yes", "strict") for doc in questions["hallusion"]]
    figures = groups_right(records, "figure", "set")
    assert [one.cluster for one in figures] == ["VD/figure/0"] * 2 + ["VS/chart/0"] * 3
    assert [one.cluster for one in groups_right(records, "figure")] == [
        *("VD/figure/0/0", "VD/figure/0/1", "VS/chart/0/1", "VS/chart/0/2", "VS/chart/0/0"),
    ]


def test_mmbench_circular(questions: Mapping[str, list[Doc]]) -> None:
    """Question 1 is right in both rotations, question 2 in its own order only."""
    report = report_of("mmbench", questions["mmbench"], ["B", "A", "C", "A"], "strict")
    assert values(report) == {"circular": 0.5, "row mean": 0.75, "rotation 0": 1.0}
    circular = report.metrics["circular"]
    assert (circular.low, circular.high) == wilson_interval(1, 2)
    assert (circular.num_total, circular.unit, circular.interval) == (2, "questions under all rotations", "wilson")
    assert report.metrics["row mean"].num_total == 4
    assert report.metrics["row mean"].interval == "bootstrap"
    assert {name: one.value for name, one in report.breakdown["category"].items()} == {"colour": 0.0, "logic": 1.0}
    assert {name: one.value for name, one in report.breakdown["l2-category"].items()} == {
        "perception": 0.0,
        "reasoning": 1.0,
    }
    headlines = {p: report_of("mmbench", questions["mmbench"], ["B"] * 4, p).headline for p in ("card", "lmms", "kit")}
    assert headlines == {"card": "row mean", "lmms": "circular", "kit": "circular"}


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_circular_is_never_above_the_row_mean_of_whole_groups(right: list[bool]) -> None:
    docs = [
        Doc(f"{rotation * 1_000_000 + index}", 0, "choice", "?", "A", options={"A": "x", "B": "y"})
        for rotation in range(3)
        for index in range(4)
    ]
    report = report_of("mmbench", docs, ["A" if one else "B" for one in right], "strict")
    groups = [right[index::4] for index in range(4)]
    assert report.metrics["circular"].value == sum(all(group) for group in groups) / 4
    assert report.metrics["row mean"].value == pytest.approx(sum(right) / 12)
    assert report.metrics["rotation 0"].value == sum(right[:4]) / 4
    assert report.metrics["circular"].value <= report.metrics["row mean"].value + 1e-12


def test_scienceqa_overall_and_image_subset(questions: Mapping[str, list[Doc]]) -> None:
    report = report_of("scienceqa", questions["scienceqa"], ["A", "A", "E"], "strict")
    assert values(report) == pytest.approx({"overall": 2 / 3, "image": 0.0})
    assert report.metrics["image"].num_total == 1
    assert report.breakdown["subject"]["social science"].value == 1.0
    headlines = {
        p: report_of("scienceqa", questions["scienceqa"], ["A"] * 3, p).headline for p in ("card", "lmms", "kit")
    }
    assert headlines == {"card": "overall", "lmms": "image", "kit": "image"}


def test_ai2d_clusters_are_diagrams(questions: Mapping[str, list[Doc]]) -> None:
    report = report_of("ai2d", questions["ai2d"], ["C", "A", "A"], "card")
    assert values(report) == pytest.approx({"accuracy": 2 / 3})
    assert report.metrics["accuracy"].interval == "bootstrap"
    assert (report.metrics["accuracy"].low, report.metrics["accuracy"].high) == (0.0, 1.0)


def test_mmmu_micro_mean_and_disciplines(questions: Mapping[str, list[Doc]]) -> None:
    replies = ["C", "A", "The sum is 10.", "8.4 V", "a pie"]
    report = report_of("mmmu", questions["mmmu"], replies, "strict")
    assert values(report) == {"accuracy": 3 / 5}
    shares = {name: (one.value, one.num_total) for name, one in report.breakdown["discipline"].items()}
    assert shares == {"Art and Design": (0.5, 2), "Science": (2 / 3, 3)}
    assert report.breakdown["question_type"]["open"].value == 2 / 3
    # A gold list is one text for lmms-eval and the card; kit asks whether "A = the gold answer" is meant.
    assert values(report_of("mmmu", questions["mmmu"], replies, "lmms")) == {"accuracy": 2 / 5}
    assert values(report_of("mmmu", questions["mmmu"], replies, "card")) == {"accuracy": 2 / 5}
    assert values(report_of("mmmu", questions["mmmu"], ["C", "B", "10", "A", "Other Answers"], "kit")) == {
        "accuracy": 4 / 5
    }


def test_seed_types(questions: Mapping[str, list[Doc]]) -> None:
    report = report_of("seed", questions["seed"], ["B", "D", "B"], "strict")
    assert values(report) == pytest.approx({"accuracy": 2 / 3})
    types = {name: (one.value, one.num_total) for name, one in report.breakdown["question_type"].items()}
    assert types == {"Instances Counting": (0.5, 2), "Scene Understanding": (1.0, 1)}


def test_mmstar_mean_and_macro(questions: Mapping[str, list[Doc]]) -> None:
    """Sub-categories: one row right, one row wrong, two rows right."""
    replies = ["A", "A", "C", "D"]
    report = report_of("mmstar", questions["mmstar"], replies, "strict")
    assert values(report) == pytest.approx({"mean": 3 / 4, "macro": 2 / 3})
    assert report.metrics["macro"].num_total == 4
    assert report.breakdown["category"]["coarse perception"].value == 0.5
    headlines = {p: report_of("mmstar", questions["mmstar"], replies, p).headline for p in ("card", "lmms", "kit")}
    assert headlines == {"card": "mean", "lmms": "macro", "kit": "mean"}


def test_errors_and_unparsed_replies_are_wrong_and_counted(questions: Mapping[str, list[Doc]]) -> None:
    report = report_of("mmbench", questions["mmbench"], ["B", None, "no idea", "B"], "strict")
    assert (report.num_questions, report.num_unparsed, report.num_errors) == (4, 1, 1)
    assert values(report) == {"circular": 0.0, "row mean": 0.5, "rotation 0": 0.5}
    assert (report.metrics["row mean"].num_scored, report.metrics["row mean"].num_total) == (3, 4)
    assert (report.metrics["circular"].num_scored, report.metrics["circular"].num_total) == (1, 2)
    assert report.rules == {"bare": 2, "none": 1}


def test_no_records_say_nothing() -> None:
    for name, task in TASKS.items():
        report = task.aggregate([], task.about.profiles[0])
        metric = report.metrics[report.headline]
        assert (name, metric.value, metric.low, metric.high, metric.num_total) == (name, 0.0, 0.0, metric.upper, 0)


@pytest.mark.parametrize(
    ("name", "profile"), [(name, profile) for name, task in TASKS.items() for profile in task.about.profiles]
)
def test_the_order_of_records_changes_nothing(questions: Mapping[str, list[Doc]], name: str, profile: Profile) -> None:
    """Many replies, of shares where there are ten answers: the report is equal to the last bit."""
    draw, task = random.Random(0), TASKS[name]
    said = ("A", "yes", "no", "dog", "cat", "2", "bird", "")
    records = [
        replace(record_of(task, doc, draw.choice(said), profile), id=f"{doc.id}-{number}")
        for number in range(15)
        for doc in questions[name]
    ]
    shuffled = draw.sample(records, len(records))
    assert task.aggregate(shuffled, profile) == task.aggregate(records, profile)


# --- every task's scorer on 1,000 constructed replies a profile ---


def bare(doc: Doc, is_right: bool) -> str:
    """The form that every profile reads: the letter, the word, the gold answer."""
    if doc.kind == "open":
        return doc.gold if is_right else "wrong word"
    if doc.kind == "yes_no":
        return doc.gold if is_right else {"yes": "no", "no": "yes"}[doc.gold]
    return doc.gold if is_right else next(letter for letter in doc.options if letter != doc.gold)


@pytest.mark.parametrize(
    ("name", "profile"), [(name, profile) for name, task in TASKS.items() for profile in task.about.profiles]
)
def test_a_score_is_the_number_of_right_replies(
    questions: Mapping[str, list[Doc]], name: str, profile: Profile
) -> None:
    """1,000 replies in the form that all profiles read: a letter, a word, the gold answer."""
    docs = [doc for doc in questions[name] if not doc.gold.startswith("[")]
    if docs[0].answers:  # of ten people, so that a reply is 0 or 1
        docs = [replace(doc, answers=("cat",) * 4 + ("dog",) * 6, gold="cat") for doc in docs]
    task = TASKS[name]
    seen: set[float] = set()

    @settings(max_examples=20, derandomize=True, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, len(docs) - 1), st.booleans()), min_size=50, max_size=50))
    def check(made: list[tuple[int, bool]]) -> None:
        for number, is_right in made:
            doc = docs[number]
            record = record_of(task, doc, bare(doc, is_right), profile)
            assert record.score == float(is_right), (doc.id, is_right)
            assert record.gold == doc.gold
            seen.add(record.score)

    check()
    assert seen == {0.0, 1.0}


PARSED_BY_LMMS = {
    # form: the tasks whose rule in lmms-eval reads it
    "({})": {"mmbench", "ai2d", "ai2d_no_mask", "mmmu", "mmstar"},
    "**{}**": {"mmbench", "ai2d", "ai2d_no_mask", "mmstar"},
    "Answer: {}": {"mmbench", "mmmu", "mmstar"},
    "{}. so it is": {"mmbench", "ai2d", "ai2d_no_mask", "mmmu", "mmstar", "scienceqa", "seed"},
}
CHOICE = ("mmbench", "scienceqa", "ai2d", "ai2d_no_mask", "mmmu", "seed", "mmstar")


@pytest.mark.parametrize("form", PARSED_BY_LMMS)
@pytest.mark.parametrize("name", CHOICE)
def test_what_a_chatty_oracle_scores(questions: Mapping[str, list[Doc]], name: str, form: str) -> None:
    """All right for strict and kit; for lmms-eval all or less, as its rule for the task reads the form."""
    docs = [doc for doc in questions[name] if doc.kind == "choice"]

    def share(profile: Profile) -> float:
        records = [record_of(TASKS[name], doc, form.format(doc.gold), profile) for doc in docs]
        return sum(record.score for record in records) / len(records)

    assert share("strict") == share("kit") == 1.0
    assert (share("lmms") == 1.0) is (name in PARSED_BY_LMMS[form])


def test_records_are_plain(tmp_path: Path) -> None:
    """A line of the ledger holds all that a report needs."""
    task = TASKS["seed"]
    docs = list(task.docs(task_files.seed(tmp_path)))
    record = record_of(task, docs[0], "B", "strict")
    line = json.loads(json.dumps(asdict(record)))
    assert line == {
        "id": "1",
        "gold": "B",
        "groups": {"picture": "1_2.jpg", "question_type": "Scene Understanding"},
        "extract": {"value": "B", "rule": "bare", "status": "ok"},
        "score": 1.0,
    }
    assert Record(**{**line, "extract": record.extract}) == record
