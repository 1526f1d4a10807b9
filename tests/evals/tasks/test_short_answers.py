"""POPE, GQA, VQAv2, TextVQA, VizWiz and MME: their layouts, rules and aggregates."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import task_files
from hypothesis import given, settings
from hypothesis import strategies as st
from task_files import TEN, WRITERS

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.registry import TASKS
from grace_vlm.evals.tasks.task import Doc, Picture, Profile, Report, record_of
from grace_vlm.evals.tasks.vqa_answers import consensus, evalai_normal, kit_normal, vqav2_normal
from grace_vlm.evals.tasks.yes_no import pope_yes_no


def docs_of(name: str, folder: Path) -> list[Doc]:
    return list(TASKS[name].docs(WRITERS[name](folder)))


def report_of(name: str, docs: list[Doc], replies: list[str], profile: Profile) -> Report:
    task = TASKS[name]
    return task.aggregate(
        [record_of(task, doc, reply, profile) for doc, reply in zip(docs, replies, strict=True)], profile
    )


def asked(name: str, doc: Doc, profile: Profile) -> str:
    picture, text = TASKS[name].prompt(doc, profile)
    assert isinstance(picture, Picture)
    assert isinstance(text, str)
    return text


# --- words made alike ---


@pytest.mark.parametrize(
    ("text", "evalai", "vqav2", "kit"),
    [
        ("A Cat.", "cat", "cat", "cat"),
        ("the two dogs", "2 dogs", "2 dogs", "2 dogs"),
        ("none", "0", "0", "0"),
        ("dont know", "don't know", "don't know", "don't know"),
        ("yall'll", "y'all'll", "y'all'll", "y'all'll"),
        ("3.5", "3.5", "3.5", "3.5"),
        ("$1,000", "$1000", "$1000", "$1000"),
        ("red,green", "redgreen", "red green", "red green"),
        ("x-ray", "x ray", "x ray", "x ray"),
        ("x- ray", "x ray", "x ray", "x ray"),
        ("Dakota's", "dakota 's", "dakota's", "dakota's"),
        ("what?", "what", "what", "what"),
        ("v.2", "v.2", "v.2", "v.2"),
        ("5. left", "5 left", "5 left", "5. left"),
        ("a\nb\tc", "b c", "b c", "b c"),
        ("", "", "", ""),
    ],
)
def test_words_are_made_alike(text: str, evalai: str, vqav2: str, kit: str) -> None:
    assert (evalai_normal(text), vqav2_normal(text), kit_normal(text)) == (evalai, vqav2, kit)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(("One", "ten", "a", "The", "cat", "dont", "its,", "no?")), max_size=5), min_size=40
    )
)
def test_normal_forms_by_words(made: list[list[str]]) -> None:
    """1,200 texts, each word by a table of its own."""
    table = {"One": "1", "ten": "10", "a": "", "The": "", "dont": "don't", "its,": "its", "no?": "no"}
    for words in made:
        expected = " ".join(table.get(word, word) for word in words if table.get(word, word))
        assert evalai_normal(" ".join(words)) == expected


@pytest.mark.parametrize(
    ("said", "share"),
    [("cat", 1.0), ("dog", 0.9), ("2", 0.6), ("bird", 0.3), ("fish", 0.0)],
)
def test_the_accuracy_over_ten_people(said: str, share: float) -> None:
    """With 4 of 10 each left-out ten has three or four; with 3 of 10, (3 x 2/3 + 7 x 1) / 10; and so on."""
    assert consensus(said, [evalai_normal(answer) for answer in TEN]) == pytest.approx(share)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=10), st.sampled_from("abcd"))
def test_consensus_by_counting(golds: list[str], said: str) -> None:
    shares = [min(Fraction(1), Fraction((golds[:i] + golds[i + 1 :]).count(said), 3)) for i in range(len(golds))]
    assert consensus(said, golds) == pytest.approx(float(sum(shares) / len(shares)))


# --- VQAv2, TextVQA, VizWiz ---

ENDING = "\nAnswer the question using a single word or phrase."


def test_prompts_of_short_answers(tmp_path: Path) -> None:
    vqav2, textvqa, vizwiz = (docs_of(name, tmp_path / name)[0] for name in ("vqav2", "textvqa", "vizwiz"))
    assert {asked("vqav2", vqav2, profile) for profile in TASKS["vqav2"].about.profiles} == {f"What Is it?{ENDING}"}
    assert asked("textvqa", textvqa, "card") == f"what Brand is it?\nReference OCR token: Dakota, DIGITAL{ENDING}"
    assert asked("textvqa", textvqa, "lmms") == f"What brand is it?{ENDING}"
    assert asked("textvqa", textvqa, "kit") == asked("textvqa", textvqa, "strict") == f"what Brand is it?{ENDING}"
    hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert asked("vizwiz", vizwiz, "card") == f"Can you tell me?{hint}{ENDING}"
    assert asked("vizwiz", vizwiz, "kit") == f"Can you tell me?{ENDING}"


@pytest.mark.parametrize("name", ["vqav2", "textvqa", "vizwiz"])
def test_scores_are_shares(tmp_path: Path, name: str) -> None:
    docs = docs_of(name, tmp_path)
    for profile in TASKS[name].about.profiles:
        report = report_of(name, docs, ["A dog."] * len(docs), profile)
        assert report.metrics["accuracy"].value == pytest.approx(0.9)
        assert report.metrics["accuracy"].interval == "bootstrap"
    assert report_of(name, docs, [" "] * len(docs), "card").num_unparsed == len(docs)
    strict, card = (report_of(name, docs, ["**dog**"] * len(docs), profile) for profile in ("strict", "card"))
    assert (strict.metrics["accuracy"].value, card.metrics["accuracy"].value) == (pytest.approx(0.9), 0.0)


def test_breakdown_of_short_answers(tmp_path: Path) -> None:
    report = report_of("vqav2", docs_of("vqav2", tmp_path / "a"), ["cat", "fish"], "lmms")
    assert {name: one.value for name, one in report.breakdown["answer_type"].items()} == {"number": 0.0, "other": 1.0}
    report = report_of("vizwiz", docs_of("vizwiz", tmp_path / "b"), ["fish", "cat"], "lmms")
    assert {name: one.value for name, one in report.breakdown["category"].items()} == {
        "other": 0.0,
        "unanswerable": 1.0,
    }


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    rows = [{"question_id": "1", "question": "?", "answers": None, "image": task_files.cell("red"), "category": "c"}]
    texts = task_files.pa.string()
    types = {"question_id": texts, "question": texts, "category": texts, "image": task_files.PICTURE}
    types["answers"] = task_files.pa.list_(texts)
    task_files.write_parquet(tmp_path / "test.parquet", rows, types)
    with pytest.raises(DataError, match=r"has None in the column 'answers'; expected the answers of ten people \(test"):
        TASKS["vizwiz"].docs(tmp_path / "test.parquet")


# --- GQA ---


def test_gqa_joins_pictures_and_compares_whole_replies(tmp_path: Path) -> None:
    docs = docs_of("gqa", tmp_path)
    assert [doc.images[0].load() for doc in docs] == [task_files.png(name) for name in ("blue", "red", "blue")]
    assert asked("gqa", docs[0], "card") == f"What is it?{ENDING}"
    scores = {
        reply: [record_of(TASKS["gqa"], docs[0], reply, profile).score for profile in TASKS["gqa"].about.profiles]
        for reply in (
            "Traffic light",
            "traffic light.",
            "traffic-light",
            "The traffic light",
            " traffic light",
            "light",
        )
    }
    assert scores == {
        "Traffic light": [1, 1, 1, 1],
        "traffic light.": [1, 1, 0, 1],
        "traffic-light": [0, 0, 0, 1],
        "The traffic light": [0, 0, 0, 1],
        " traffic light": [1, 1, 1, 1],
        "light": [0, 0, 0, 0],
    }
    shirt = Doc("1", 0, "open", "?", "t-shirt", docs[0].images, columns={"picture": "n1"})
    for profile in TASKS["gqa"].about.profiles:
        assert record_of(TASKS["gqa"], shirt, "T-shirt", profile).score == 1.0
    assert report_of("gqa", docs, ["no", "yes", "right"], "card").metrics["accuracy"].value == pytest.approx(1 / 3)


def test_gqa_needs_both_tables(tmp_path: Path) -> None:
    folder = task_files.gqa(tmp_path)
    file = folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    with pytest.raises(
        DataError, match="is a file; the folder with testdev_balanced_instructions and testdev_balanced_"
    ):
        TASKS["gqa"].docs(file)
    types = {"id": task_files.pa.string(), "image": task_files.PICTURE}
    task_files.write_parquet(file, [{"id": "n1", "image": task_files.cell("red")}], types)
    with pytest.raises(
        DataError, match="has 'n2' in the column 'imageId'; expected the id of a picture in testdev_bal"
    ):
        TASKS["gqa"].docs(folder)


# --- POPE ---


def test_pope_by_hand(tmp_path: Path) -> None:
    """Gold: yes no yes | yes no no. Said: yes yes ? | yes no yes: TP 2, FP 2, FN 1 (unparsed), TN 1."""
    docs = docs_of("pope", tmp_path)
    assert [doc.id for doc in docs] == ["random/0", "random/1", "random/2", "popular/0", "popular/1", "popular/2"]
    replies = ["Yes", "yes", "perhaps", "YES", "no", "yes"]
    metrics = {p: report_of("pope", docs, replies, p).metrics for p in ("strict", "lmms", "kit")}
    for profile, recall in (("strict", 2 / 3), ("kit", 2 / 3), ("lmms", 1.0)):
        found = {name: one.value for name, one in metrics[profile].items()}
        assert found == pytest.approx(
            {
                "accuracy": 3 / 6,
                "F1": 4 / 7,
                "F1 by category": (2 / 4 + 2 / 3) / 2,
                "precision": 2 / 4,
                "recall": recall,
                "yes ratio": 4 / 6,
            }
        )
    assert report_of("pope", docs, replies, "card").num_unparsed == 0
    assert report_of("pope", docs, replies, "card").metrics["recall"].value == 1.0
    headlines = {p: report_of("pope", docs, replies, p).headline for p in TASKS["pope"].about.profiles}
    assert headlines == {"card": "F1 by category", "lmms": "accuracy", "kit": "F1", "strict": "F1"}


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("No, there is none", "no"),
        ("It is not. Yes", "no"),
        ("Yes. There is no cat", "yes"),
        ("NO", "yes"),
        ("", "yes"),
    ],
)
def test_popes_official_rule(reply: str, value: str) -> None:
    assert pope_yes_no(reply).value == value


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(("Yes", "no", "No,", "not", "NO", "nothing", ".", "cat.")), max_size=6).map(" ".join),
        min_size=40,
        max_size=40,
    )
)
def test_popes_rule_said_again(replies: list[str]) -> None:
    for reply in replies:
        first = re.sub(",", "", re.split(r"\.", reply, maxsplit=1)[0])
        denied = re.search(r"(?:^|(?<= ))(?:[Nn]o|not)(?=$| )", first)
        assert pope_yes_no(reply).value == ("no" if denied else "yes"), reply


# --- MME ---


def test_mme_by_hand(tmp_path: Path) -> None:
    """count: 3 of 4 right, one of two pictures whole: 75 + 50. OCR: both, 200. code_reasoning: 1 of 2, none: 50."""
    docs = docs_of("mme", tmp_path)
    assert docs[1].id == "count/a.png/2"
    replies = ["Yes", "No", "Yes", "Yes", "Yes", "No", "No", "No"]
    report = report_of("mme", docs, replies, "strict")
    assert {name: one.value for name, one in report.metrics.items()} == pytest.approx(
        {"total": 375.0, "perception": 325.0, "cognition": 50.0, "accuracy": 6 / 8}
    )
    assert [report.metrics[name].upper for name in ("total", "perception", "cognition")] == [600.0, 400.0, 200.0]
    assert report.breakdown["category"]["count"].value == pytest.approx(125.0)
    low, high = report.metrics["total"].low, report.metrics["total"].high
    assert 0 <= low < 375 < high <= 600
    assert asked("mme", docs[0], "card") == f"Is it one?{ENDING}"
    assert asked("mme", docs[0], "kit") == "Is it one? Please answer yes or no."
    assert report_of("mme", docs, replies, "card").headline == "perception"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows.pop(), r"has 1 questions for code_reasoning/c.png; expected 2 a picture: fetch it again"),
        (lambda rows: rows[0].update(category="cats"), r"'cats' in the column 'category'; expected one of existence, "),
        (lambda rows: rows[0].update(answer="maybe"), r"'maybe' in the column 'answer'; expected yes or no: "),
    ],
)
def test_mme_rows_that_cannot_be_scored(
    tmp_path: Path, change: Callable[[list[dict[str, object]]], object], reason: str
) -> None:
    file = task_files.mme(tmp_path) / "data" / "test-00000-of-00001.parquet"
    table = task_files.pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    task_files.pq.write_table(task_files.pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(DataError, match=reason):
        TASKS["mme"].docs(tmp_path)
