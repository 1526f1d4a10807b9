"""Every gold follows from what is shown or written: from pixels, from the hint, from what a question knows."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import sight
import toy_rows

FACTS = {"spider": 8, "bee": 6, "cat": 4, "hen": 2, "crab": 10, "snake": 0, "car": 4, "bicycle": 2, "tricycle": 3,
         "unicycle": 1, "triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8, "violin": 4, "guitar": 6,
         "banjo": 5, "balalaika": 3}  # fmt: skip


def test_golds_are_what_the_pixels_show(suite: Path) -> None:
    """Two thirds of the questions about one picture take no reading: all of those are answered from its pixels."""
    num_checked: Counter[str] = Counter()
    known: dict[tuple[str, bytes], str | None] = {}
    num_asked = 0
    for question, png, gold in toy_rows.asked(suite):
        num_asked += 1
        if (question, png) not in known:
            known[question, png] = sight.answer(question, png)
        if (seen := known[question, png]) is not None:
            assert seen == gold, question
            num_checked[question.split()[0]] += 1
    assert num_asked > 1_200
    assert sum(num_checked.values()) > 900
    assert set(num_checked) >= {"what", "how", "is", "are", "where"}


def test_a_wrong_gold_would_be_seen(suite: Path) -> None:
    """The oracle tells edited pictures apart: asked of the original's picture, the edited gold is wrong."""
    pairs = defaultdict(dict)
    for row in toy_rows.hallusion(suite):
        if row["category"] == "VD" and row["subcategory"] == "figure":
            pairs[row["set_id"], row["question_id"]][row["figure_id"]] = row
    caught = 0
    for pair in pairs.values():
        seen = sight.answer(pair["0"]["question"], pair["0"]["image"]["bytes"])
        if seen is not None and pair["0"]["gt_answer"] != pair["1"]["gt_answer"]:
            assert {"yes": "1", "no": "0"}[seen] != pair["1"]["gt_answer"]
            caught += 1
    assert caught >= 8


def knows(question: str, values: dict[str, int]) -> bool:
    if found := re.fullmatch(r"does an? (\w+) have more \w+ than an? (\w+)\?", question):
        return values[found[1]] > values[found[2]]
    found = re.fullmatch(r"does an? (\w+) have (\d+) \w+\?", question)
    assert found is not None, question
    return values[found[1]] == int(found[2])


def test_supplement_golds_are_the_worlds_without_and_the_pictures_with_a_figure(suite: Path) -> None:
    rows = [row for row in toy_rows.hallusion(suite) if row["category"] == "VS"]
    assert len(rows) == 72
    for row in rows:
        shown = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", row["gt_answer_details"])}
        is_true = row["figure_id"] in ("0", "1")
        values = {**FACTS, **shown}
        assert (values == FACTS) == is_true
        assert row["gt_answer"] == str(int(knows(row["question"], values)))


def test_digit_golds_follow_from_the_details(suite: Path) -> None:
    num_checked = 0
    for row in toy_rows.hallusion(suite):
        if not re.search("\\d", row["question"]) or row["category"] == "VS":
            continue
        said, _, text = row["gt_answer_details"].partition(": ")
        values = [[int(value) for value in line.split()] for line in text.split(". ")]
        if found := re.fullmatch(r"is there a (\d) in row (\d), column (\d)\?", row["question"]):
            is_so = values[int(found[2]) - 1][int(found[3]) - 1] == int(found[1])
        else:
            found = re.fullmatch(r"is the sum of row (\d) equal to (\d+)\?", row["question"])
            is_so = sum(values[int(found[1]) - 1]) == int(found[2])
        assert said == ("yes" if is_so else "no")
        assert row["gt_answer"] == str(int(is_so))
        num_checked += 1
    assert num_checked == 30


def test_text_only_problems_are_answered_by_their_hint_and_by_nothing_else(suite: Path) -> None:
    problems = json.loads((suite / "scienceqa" / "problems.json").read_text())
    text_only = [problem for problem in problems.values() if problem["image"] is None]
    assert len(text_only) == 80
    for problem in text_only:
        question, hint, gold = problem["question"], problem["hint"], problem["choices"][problem["answer"]]
        if hint.startswith("A food chain: "):
            chain = hint.removeprefix("A food chain: ").partition(". ")[0].split(" -> ")
            if found := re.search("what eats the (.+)\\?", question):
                assert gold == chain[chain.index(found[1]) + 1]
            elif found := re.search("what does the (.+) eat\\?", question):
                assert gold == chain[chain.index(found[1]) - 1]
            else:
                assert gold == chain[-1 if "the end" in question else 0]
        else:
            values = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", hint)}
            ordered = sorted(values, key=values.__getitem__)
            if found := re.fullmatch(r"how many (\w+) are there\?", question):
                assert gold == str(values[found[1]])
            else:
                places = {"second tallest": -2, "tallest": -1, "most": -1, "shortest": 0, "fewest": 0}
                assert gold == ordered[next(place for word, place in places.items() if word in question)]


def test_open_golds_are_numbers_words_and_lists(suite: Path) -> None:
    golds = [row["answer"] for row in toy_rows.mmmu(suite) if row["question_type"] == "open"]
    lists = [ast.literal_eval(gold) for gold in golds if gold.startswith("[")]
    numbers = [gold for gold in golds if re.fullmatch(r"\d+(\.\d+)?", gold)]
    assert (len(golds), len(lists), len(numbers)) == (15, 5, 5)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    assert all(words[int(figure)] == word for figure, word in lists)
    assert any("." in number for number in numbers)


def test_the_chart_options_of_mmmu(suite: Path) -> None:
    """Pictures as options: which chart's tallest bar has the colour; and of two charts, which bar is taller."""
    num_checked = 0
    for row in toy_rows.mmmu(suite):
        pictures = [image["bytes"] for n in range(1, 8) if (image := row[f"image_{n}"])]
        options = ast.literal_eval(row["options"])
        if options and options[0].startswith("<image"):
            tallest = {f"<image {n}>": sight.answer("what color is the tallest bar?", png)
                       for n, png in enumerate(pictures, 1)}  # fmt: skip
            found = re.search(r"is the (\w+) bar the tallest", row["question"])
            wanted = found[1] if found else tallest["<image 1>"]
            assert [option for option in options if tallest[option] == wanted] == [options["ABCD".index(row["answer"])]]
        elif "<image 2>" in row["question"]:
            color = re.search(r"is the (\w+) bar taller", row["question"])[1]
            first, second = (int(sight.answer(f"what is the value of the {color} bar?", png)) for png in pictures)
            assert row["answer"] == ("A" if first > second else "B")
        else:
            continue
        num_checked += 1
    assert num_checked == 30
