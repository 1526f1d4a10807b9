"""The mix's pictures and questions: every answer worked out again from the words of the question by another route, and
what is said to be somewhere looked for in the pixels there."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_packages import COUNTRIES, color, emoji_files, emoji_records, flag_files, write_digits, write_folder

from grace_vlm.data.sources.questions import Question
from grace_vlm.data.sources.world import (
    digits_source,
    emoji,
    emoji_questions,
    emoji_scenes,
    figures,
    flags,
    flags_source,
)
from grace_vlm.data.sources.world import series as series_module
from grace_vlm.data.sources.world.drawn import Asked, about, ask, phrase
from grace_vlm.data.sources.world.easy_source import EasySource
from grace_vlm.data.sources.world.emoji_words import GROUPS, many, one
from grace_vlm.data.sources.world.grounds import GROUND_COLORS
from grace_vlm.evals.toy.drawings.flags import FLAGS
from grace_vlm.media.canvas import COLORS

PLACES = {
    (1, 2): ["left", "right"],
    (2, 2): ["top left", "top right", "bottom left", "bottom right"],
    (3, 3): ["top left", "top center", "top right", "middle left", "center", "middle right", "bottom left",
             "bottom center", "bottom right"],
}  # fmt: skip


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def distance(first: np.ndarray, second: tuple[int, int, int]) -> float:
    return float(np.abs(first - np.array(second)).mean())


def open_answer(question: Question) -> str:
    """The answer in words: a letter's option."""
    if question.form != "choice":
        return question.answer
    found = dict(re.findall(r"^\(?([A-D])[.)] (.+)$", question.text, re.MULTILINE))
    assert len(set(found.values())) == len(found) >= 3, question.text
    return found[question.answer]


def asked_text(question: Question) -> str:
    """Without options and requests."""
    return question.text.removeprefix("Question: ").split("\n")[0]


# --- emoji ---


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> emoji.Catalogue:
    return emoji.read_catalogue(write_folder(tmp_path_factory.mktemp("emoji"), emoji_files()), seed=0)


SORTS = {"animal-mammal": "animal", "food-fruit": "food", "transport-ground": "vehicle"}
GROUP_OF = {one["short_name"]: SORTS[one["subcategory"]] for one in emoji_records()[:-2]}
COLOR_OF = {one["short_name"]: color(number) for number, one in enumerate(emoji_records()[:-2])}


def emoji_answer(rows: list[list[str | None]], ground: str | None, text: str) -> str:
    """From a question's words and what is where."""
    cells = {(r, c): name for r, row in enumerate(rows) for c, name in enumerate(row) if name}
    names = list(cells.values())
    words = PLACES.get((len(rows), len(rows[0])), [])
    place_of = {place: words[place[0] * len(rows[0]) + place[1]] for place in cells} if words else {}
    plural = {many(name): name for name in GROUP_OF}
    of_group = {GROUPS[group][0]: group for group in GROUPS}
    where = {name: place for place, name in cells.items()}
    if text in ("What is this?", "What does the picture show?", "What is shown in the picture?"):
        return names[0]
    if text == "What color is the background?":
        assert ground is not None
        return ground
    if text == "What kind of thing is shown?":
        return GROUP_OF[names[0]]
    if found := re.fullmatch(r"What kind of (\w+) is this\?", text):
        return {"animal": "mammal", "food": "fruit", "vehicle": "land vehicle"}[found[1]]
    if found := re.fullmatch(r"Is this a picture of (?:an? )?(\w+)\?", text):
        return "yes" if found[1] == names[0] else "no"
    if found := re.fullmatch(r"Does the picture show (?:an? )?(.+)\?", text):
        return "yes" if found[1] == GROUP_OF[names[0]] else "no"
    if found := re.fullmatch(r"Is there (?:an? )?(\w+) in the picture\?", text):
        return "yes" if found[1] in names else "no"
    if found := re.fullmatch(r"What is (?:in|on) the (.+)\?", text):
        return next(name for place, name in cells.items() if place_of[place] == found[1])
    if found := re.fullmatch(r"Where is the (\w+)\?", text):
        return place_of[where[found[1]]]
    if found := re.fullmatch(r"What is directly (.+) the (\w+)\?", text):
        step = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[found[1]]
        row, column = where[found[2]]
        return cells[row + step[0], column + step[1]]
    if found := re.fullmatch(r"Is the (\w+) (above|below|to the left of|to the right of) the (\w+)\?", text):
        axis = 0 if found[2] in ("above", "below") else 1
        first, second = where[found[1]][axis], where[found[3]][axis]
        assert first != second
        return "yes" if (first < second) == (found[2] in ("above", "to the left of")) else "no"
    if text == "How many things are in the picture?":
        return str(len(names))
    if found := re.fullmatch(r"How many (.+) are there\?", text):
        if found[1] in plural:
            return str(names.count(plural[found[1]]))
        return str(sum(GROUP_OF[name] == of_group[found[1]] for name in names))
    if found := re.fullmatch(r"Are there more (.+) than (.+)\?", text):
        return "yes" if names.count(plural[found[1]]) > names.count(plural[found[2]]) else "no"
    counts = Counter(GROUP_OF[name] for name in names)
    if text == "Which one does not belong with the others?":
        return next(name for name in names if counts[GROUP_OF[name]] == 1)
    if text == "What kind of thing are three of the four?":
        return next(group for group, number in counts.items() if number == 3)
    assert text == "Are both of the same kind of thing?", text
    return "yes" if len(counts) == 1 else "no"


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_emoji(catalogue: emoji.Catalogue, split: str) -> None:
    dealer = emoji_scenes.Dealer(catalogue, split)
    kinds: Counter[str] = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        scene = emoji_scenes.compose(rng, dealer)
        shown = emoji_questions.Shown(scene, dealer)
        rows = [list(row) for row in scene.cells]
        for question in ask(rng, shown, emoji_questions.KINDS[scene.layout], 8):
            kinds[question.kind] += 1
            assert open_answer(question) == emoji_answer(rows, scene.ground_color, asked_text(question)), question
        is_shown = [name in catalogue.held_out for name in scene.names()]
        assert any(is_shown) == (split == "unseen")
        image = pixels(emoji_scenes.draw(scene, catalogue))
        assert image.shape == (192, 192, 3)
        for name, _, how in scene.drawn:
            x, y = (min(191, max(0, round(value))) for value in how.center)
            assert distance(image[y, x], COLOR_OF[name]) < 24, (seed, name)
            row = int(how.center[1] // (192 / len(rows)))
            column = int(how.center[0] // (192 / len(rows[0])))
            assert scene.cells[row][column] == name
    assert set(kinds) == {kind for listing in emoji_questions.KINDS.values() for kind in listing}


def test_what_is_left_out_of_the_emoji(catalogue: emoji.Catalogue) -> None:
    assert set(catalogue.things) == set(GROUP_OF)  # neither the flag nor what has no picture
    held_out = Counter(GROUP_OF[name] for name in catalogue.held_out)
    assert held_out == {"animal": 1, "food": 1, "vehicle": 1}
    assert sorted(catalogue.names(True) + catalogue.names(False)) == sorted(GROUP_OF)


def test_a_ground_has_the_colour_that_it_is_called() -> None:
    dealt = [emoji_scenes.choose_ground(random.Random(seed)) for seed in range(200)]
    listing = list(GROUND_COLORS.items())
    for ground, name in dealt:
        assert (name is None) == (ground.pattern != "plain")
        if name is not None:
            gaps = {key: min(distance(np.array(ground.first), rgb) for rgb in shades) for key, shades in listing}
            assert min(gaps, key=lambda key: gaps[key]) == name


def test_words_with_their_articles_and_plurals() -> None:
    assert [one(name) for name in ("dog", "owl", "grapes", "bread", "unicorn face", "Santa Claus")] == [
        "a dog", "an owl", "grapes", "bread", "a unicorn face", "Santa Claus",
    ]  # fmt: skip
    assert [one(name) for name in ("face with stuck-out tongue", "heart with arrow", "bowl of noodles")] == [
        "a face with stuck-out tongue", "a heart with arrow", "a bowl of noodles",
    ]  # fmt: skip
    listed = ("dog", "bus", "cherries", "bread", "butterfly", "slice of pie", "mouse", "wolf")
    assert [many(name) for name in listed] == [
        "dogs", "buses", "pictures of cherries", "pictures of bread", "butterflies", "slices of pie", "mice", "wolves",
    ]  # fmt: skip


# --- flags ---


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> flags.Atlas:
    pytest.importorskip("resvg_py")
    folder = write_folder(tmp_path_factory.mktemp("flags"), flag_files())
    flags.render(folder, folder / "rendered")
    return flags.read_atlas(folder, folder / "rendered", seed=0)


def flag_answer(names: list[str], text: str) -> str:
    facts = {name: (capital, continent) for name, capital, continent in COUNTRIES.values()}
    words = PLACES.get({2: (1, 2), 4: (2, 2)}.get(len(names), (0, 0)), [])
    if text in ("Which country has this flag?", "Whose flag is this?"):
        return names[0]
    if text == "What is the capital of the country with this flag?":
        return facts[names[0]][0]
    if text == "On which continent is the country with this flag?":
        return facts[names[0]][1]
    if found := re.fullmatch(r"Is this the flag of (.+)\?", text):
        return "yes" if found[1] == names[0] else "no"
    if found := re.fullmatch(r"Is the country with this flag in (.+)\?", text):
        return "yes" if found[1] == facts[names[0]][1] else "no"
    if found := re.fullmatch(r"Is (.+) the capital of the country with this flag\?", text):
        return "yes" if found[1] == facts[names[0]][0] else "no"
    if found := re.fullmatch(r"Which country's flag is (?:in|on) the (.+)\?", text):
        return names[words.index(found[1])]
    if found := re.fullmatch(r"Where is the flag of a country in (.+)\?", text):
        (place,) = [place for place, name in enumerate(names) if facts[name][1] == found[1]]
        return words[place]
    if found := re.fullmatch(r"Where is the flag of (.+)\?", text):
        return words[names.index(found[1])]
    if found := re.fullmatch(r"Is the flag of (.+) in the picture\?", text):
        return "yes" if found[1] in names else "no"
    if found := re.fullmatch(r"How many of these flags are of countries in (.+)\?", text):
        return str(sum(facts[name][1] == found[1] for name in names))
    assert text == "Are both countries on the same continent?", text
    return "yes" if facts[names[0]][1] == facts[names[1]][1] else "no"


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_flags(atlas: flags.Atlas, split: str) -> None:
    colors = {name: color(number) for number, (name, *_) in enumerate(COUNTRIES.values())}
    kinds: Counter[str] = Counter()
    for seed in range(200):
        rng = random.Random(seed)
        scene = flags_source.compose(rng, atlas, split)
        names = [country.name for country in scene.countries]
        for question in ask(rng, scene, flags_source.KINDS[scene.layout], 8):
            kinds[question.kind] += 1
            assert open_answer(question) == flag_answer(names, asked_text(question)), question
        assert sum(name in atlas.held_out for name in names) == (split == "unseen")
        image = pixels(flags_source.draw(scene, atlas))
        for name, how in zip(names, scene.how, strict=True):
            x, y = (round(value) for value in how.center)
            assert distance(image[y, x], colors[name]) < 12
    assert set(kinds) == {kind for listing in flags_source.KINDS.values() for kind in listing}


def test_flags_that_the_toy_suite_draws_are_not_held_out() -> None:
    assert set(flags.TOY_SUITE) == set(FLAGS)


def test_of_equal_flags_the_country_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    files = flag_files()
    records = [
        {"code": code, "name": name, "capital": name, "continent": "Europe", "iso": True}
        for code, name in (("bq", "Bonaire"), ("nl", "Netherlands"), ("aa", "Aland"))
    ]
    files = {
        **files,
        "country.json": str(records).replace("'", '"').replace("True", "true").encode(),
        **dict.fromkeys(("flags/4x3/bq.svg", "flags/4x3/nl.svg"), files["flags/4x3/ab.svg"]),
    }
    folder = write_folder(tmp_path, files)
    flags.render(folder, folder / "rendered")
    assert sorted(flags.read_atlas(folder, folder / "rendered", 0).countries) == ["Aland", "Netherlands"]


# --- charts of real figures ---

ORDINALS = ["the first", "the second", "the third", "the fourth", "the fifth", "the sixth", "the seventh"]


def figure_answer(labels: list[str], texts: list[str], layout: str, title: str, text: str) -> str:
    values = [float(one) for one in texts]

    def place(words: str) -> int:
        return ORDINALS.index(words) if words in ORDINALS else labels.index(words)

    if found := re.fullmatch(r"(?:When is the value|Which has the) (largest|smallest)(?: value)?\?", text):
        return labels[values.index({"largest": max, "smallest": min}[found[1]](values))]
    if found := re.fullmatch(r"What is the value of (.+)\?", text):
        return texts[labels.index(found[1])]
    if found := re.fullmatch(r"(?:When|Which) is the value ([\d.]+)\?", text):
        return labels[texts.index(found[1])]
    if found := re.fullmatch(r"Is the value of (.+) larger than that of (.+)\?", text):
        return "yes" if values[place(found[1])] > values[place(found[2])] else "no"
    if found := re.fullmatch(r"Which is (larger|smaller), (.+) or (.+)\?", text):
        first, second = labels.index(found[2]), labels.index(found[3])
        return labels[first if (values[first] > values[second]) == (found[1] == "larger") else second]
    if text.startswith("How many values are above"):
        return str(sum(value > float(text.split()[-1].rstrip("?")) for value in values))
    if found := re.fullmatch(r"How many (\w+) are there\?", text):
        return str(len(values))
    if found := re.fullmatch(r"How much larger is (.+) than (.+)\?", text):
        return str(int(texts[labels.index(found[1])]) - int(texts[labels.index(found[2])]))
    if found := re.fullmatch(r"Is the last value (higher|lower) than the first\?", text):
        return "yes" if (values[-1] > values[0]) == (found[1] == "higher") else "no"
    if text == "What kind of figure is this?":
        return {"columns": "bar chart", "bars": "bar chart", "line": "line chart", "pie": "pie chart"}.get(
            layout, "table"
        )
    assert text == "What is the title?", text
    return title


def extent(image: np.ndarray, fill: tuple[int, int, int], axis: int) -> list[int]:
    """Of each run of coloured pixels along ``axis``, its length across it."""
    marks = (image == np.array(fill)).all(-1)
    along = marks.sum(axis=1 - axis)
    runs, found = np.flatnonzero(np.diff(np.r_[0, along > 0, 0])), []
    for start, stop in runs.reshape(-1, 2):
        found.append(int(along[start:stop].max()))
    return found


def test_charts_of_real_figures() -> None:
    listing = series_module.read_series(series_module.find_package().folder)
    assert len(listing) == 12
    kinds: Counter[str] = Counter()
    layouts: Counter[str] = Counter()
    for seed in range(400):
        rng = random.Random(seed)
        figure = figures.compose(rng, listing)
        labels, texts = list(figure.series.labels), list(figure.texts)
        for question in ask(rng, figure, figures.KINDS, 12):
            kinds[question.kind] += 1
            answer = figure_answer(labels, texts, figure.layout, figure.series.title, asked_text(question))
            assert open_answer(question) == answer, question
        image, values = pixels(figures.draw(figure)), [float(one) for one in texts]
        assert image.shape == (192, 192, 3)
        layouts[figure.layout] += 1
        fill = figures.FILLS[figure.fill]
        if figure.layout in ("columns", "bars"):
            lengths = extent(image, fill, axis=1 if figure.layout == "columns" else 0)
            shown = [value for value in values if value > 0.02 * max(values)]
            if len(shown) == len(values):
                assert len(lengths) == len(values)
                for length, value in zip(lengths, values, strict=True):
                    assert abs(length / max(lengths) - value / max(values)) < 0.03
        if figure.layout == "pie":
            areas = [
                int((image[24:132] == np.array(figures.FILLS[(figure.fill + n) % len(figures.FILLS)])).all(-1).sum())
                for n in range(len(values))
            ]
            for area, value in zip(areas, values, strict=True):
                assert abs(area / sum(areas) - value / sum(values)) < 0.03
    assert set(kinds) == set(figures.KINDS)
    assert set(layouts) == set(figures.LAYOUTS)


def test_a_figure_is_the_package_s() -> None:
    listing = series_module.read_series(series_module.find_package().folder)
    found = {
        series.title: dict(zip(series.labels, series.values, strict=True)) for group in listing for series in group
    }
    assert found["price of wheat"]["1565"] == 41
    assert found["Apple, price in 2010"]["Mar"] == 223.02
    assert found["airports by state"]["TX"] == 209
    assert found["gas price in dollars"]["1956"] == 2.38


# --- digits ---


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_digits(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def digit_answer(scene: digits_source.DigitScene, text: str) -> str:
    values, side = list(scene.values), scene.columns
    if text in ("Which digit is this?", "Which number is written?"):
        return "".join(map(str, values))
    if found := re.fullmatch(r"Is the (?:digit|number) (even|odd)\?", text):
        return "yes" if (int("".join(map(str, values))) % 2 == 0) == (found[1] == "even") else "no"
    if found := re.fullmatch(r"Is the digit larger than (\d)\?", text):
        return "yes" if values[0] > int(found[1]) else "no"
    if found := re.fullmatch(r"What is the (first|last) digit\?", text):
        return str(values[0 if found[1] == "first" else -1])
    if found := re.fullmatch(r"Which digit is in the (.+)\?", text):
        return str(values[PLACES[side, side].index(found[1])])
    if found := re.fullmatch(r"What is the (largest|smallest) digit\?", text):
        return str(sorted(values)[-1 if found[1] == "largest" else 0])
    if text == "What is the sum of the digits?":
        return str(sum(values))
    if found := re.fullmatch(r"What is the sum of row (\d)\?", text):
        return str(sum(values[(int(found[1]) - 1) * side : int(found[1]) * side]))
    if found := re.fullmatch(r"How many times does (\d) appear\?", text):
        return str(values.count(int(found[1])))
    found = re.fullmatch(r"Is there a (\d)\?", text)
    assert found, text
    return "yes" if int(found[1]) in values else "no"


def test_digits(site: Path) -> None:
    scans = digits_source.read_scans(digits_source.find_package().folder)
    assert [scan.value for scan in scans[:12]] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert scans[3].coverage[:5] == bytes([255, 255, 255, 0, 0])
    kinds: Counter[str] = Counter()
    for seed in range(200):
        rng = random.Random(seed)
        scene = digits_source.compose(rng, scans)
        for question in ask(rng, scene, digits_source.KINDS[scene.layout], 8):
            kinds[question.kind] += 1
            assert open_answer(question) == digit_answer(scene, asked_text(question)), question
        image = pixels(digits_source.draw(scene))
        # A tiny digit has as many inked pixels as its value.
        cell, rows = 192 / scene.columns, len(scene.scans) // scene.columns
        for place, scan in enumerate(scene.scans):
            left = round(place % scene.columns * cell)
            top = round(place // scene.columns * cell) if rows > 1 else round(96 - cell / 2)
            part = image[top : top + round(cell), left : left + round(cell)]
            is_inked = any(distance(pixel, scene.ink) < 60 for pixel in part.reshape(-1, 3)[::3])
            assert is_inked == (scan.value > 0)
    assert set(kinds) == {kind for listing in digits_source.KINDS.values() for kind in listing}
    source = digits_source.DigitsSource(site / "sklearn", 0)
    assert len(source._scans["train"]) == 120
    assert len(source._scans["test"]) == 20


# --- easy-VQA ---


def test_easy_vqa_is_asked_as_often_what_is_there_as_what_is_not() -> None:
    source = EasySource(0)
    truths: Counter[bool] = Counter()
    kinds: Counter[str] = Counter()
    for number in range(240):
        for drawn in source.unit("train", number):
            words = set(re.findall(r"\w+", drawn.caption))
            for question in drawn.questions:
                kinds[question.kind] += 1
                if question.kind == "easy_yes_no":
                    named = set(re.findall(r"\w+", question.text)) & (set(COLORS) | {"circle", "rectangle", "triangle"})
                    truths[named <= words] += 1
                    is_negated = " no " in f" {question.text}" or " not " in question.text
                    assert question.answer == ("yes" if (named <= words) != is_negated else "no")
    assert truths[True] == truths[False] > 50
    assert {"mosaic_in_corner", "mosaic_where", "mosaic_neighbor", "easy_color", "easy_shape"} <= set(kinds)


# --- forms ---


def test_a_question_with_wrong_answers_is_a_choice_now_and_then_in_both_forms() -> None:
    asked = Asked("What is this?", "dog", ("cat", "dog", "cow", "pig"))
    forms = Counter()
    letters: Counter[str] = Counter()
    for seed in range(600):
        question = phrase(random.Random(seed), "kind", asked)
        forms[question.form] += 1
        assert open_answer(question) == "dog"
        if question.form == "choice":
            forms["card" if question.text.startswith("Question: ") else "lmms"] += 1
            letters[question.answer] += 1
    assert 0.22 < forms["choice"] / 600 < 0.38
    assert min(forms["card"], forms["lmms"]) > 60
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 0.45 * letters.total()
    assert phrase(random.Random(0), "kind", Asked("Is it?", "yes", ("no", "maybe"))).form == "yes_no"
    assert {phrase(random.Random(seed), "kind", Asked("Who?", "a", ("b",))).form for seed in range(40)} == {"open"}


def test_questions_about_names_are_found_by_whole_words() -> None:
    asked = [
        Question("k", "open", text, answer)
        for text, answer in (("An elephant?", "no"), ("What?", "Ant"), ("ants?", "x"))
    ]
    assert about(asked, {"ant"}) == [asked[1]]
    assert about(asked, set()) == []


def test_card_and_lmms_forms_are_those_of_the_evaluation() -> None:
    from grace_vlm.data.sources.world.drawn import choice_text
    from grace_vlm.evals.tasks.prompts import LMMS_ENDING, card_choice, dotted

    options = {"A": "dog", "B": "cat", "C": "cow"}
    made: set[Any] = {choice_text(random.Random(seed), "What is this?", list(options.values())) for seed in range(20)}
    assert made == {card_choice("What is this?", options), f"What is this?\n{dotted(options)}\n{LMMS_ENDING}"}
