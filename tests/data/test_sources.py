"""Generated pictures: every candidate answer recomputed from the question's words by another route, the pixels checked
against the description, and the prepared folder byte for byte."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grace_vlm.data.check import check_file
from grace_vlm.data.sources import SOURCES, charts, diagrams, digits, easy_vqa, grids, prepare, scenes
from grace_vlm.data.sources.choose import choose_questions
from grace_vlm.data.sources.questions import CHOICE_REQUEST, ask
from grace_vlm.errors import CheckpointError, ConfigError
from grace_vlm.media.canvas import COLORS

SMALL = {"num_train_images": 40, "num_val_images": 20, "num_test_images": 20}
SEEDS = range(60)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def is_color(image: np.ndarray, color: str) -> np.ndarray:
    return (image == COLORS[color]).all(-1)


def check_candidates(kinds: dict, scene: object, answer_of: object) -> int:
    """Every candidate of every kind against ``answer_of(question)``; returns how many."""
    num_checked = 0
    for kind, listing in kinds.items():
        for text, answer in listing(scene):
            assert answer_of(text) == answer, (kind, text, scene)
            assert len(text.split()) <= 14
            num_checked += 1
    return num_checked


# --- grids ---


def grid_answer(objects: list[tuple[int, int, str, str]], text: str) -> str:
    """Answers from the words of the question and a flat list of (row, column, colour, shape), rows from 1."""

    def matching(phrase: str) -> list[tuple[int, int, str, str]]:
        words = [
            re.sub("(?<=cross)es$|(?<!cros)s$", "", word) for word in phrase.split() if not word.startswith("shape")
        ]
        return [thing for thing in objects if all(word in thing[2:] for word in words)]

    if found := re.fullmatch(r"how many (.+) are there\?", text):
        return str(len(matching(found[1])))
    if found := re.fullmatch(r"is there a (.+)\?", text):
        return "yes" if matching(found[1]) else "no"
    if found := re.fullmatch(r"are there more (.+) than (.+)\?", text):
        return "yes" if len(matching(found[1])) > len(matching(found[2])) else "no"
    if found := re.fullmatch(r"what (color|shape) is (?:the shape )?in row (\d), column (\d)\?", text):
        (thing,) = [thing for thing in objects if thing[:2] == (int(found[2]), int(found[3]))]
        return thing[2 if found[1] == "color" else 3]
    if found := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", text):
        (first,), (second,) = matching(found[1]), matching(found[3])
        axis = 1 if found[2].endswith("of") else 0
        assert first[axis] != second[axis], "a tie has no answer"
        return "yes" if (first[axis] < second[axis]) == (found[2] in ("left of", "above")) else "no"
    found = re.fullmatch(
        r"what (color|shape) is (?:the shape )?directly (left of|right of|above|below) the (.+)\?", text
    )
    (anchor,) = matching(found[3])
    down, right = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[found[2]]
    (thing,) = [thing for thing in objects if thing[:2] == (anchor[0] + down, anchor[1] + right)]
    return thing[2 if found[1] == "color" else 3]


def test_grids() -> None:
    num_checked = 0
    tiles = easy_vqa.read_tiles(0)["val"]
    for seed in SEEDS:
        rng = random.Random(seed)
        grid = grids.compose(rng) if seed % 4 else grids.compose_mosaic(rng, tiles)
        objects = [(row + 1, column + 1, cell.color, cell.shape) for row, column, cell in grid.filled()]
        num_checked += check_candidates(grids.KINDS, grid, lambda text, objects=objects: grid_answer(objects, text))
        image, side = pixels(grids.draw(grid)), len(grid.cells)
        assert image.shape == (128, 128, 3)
        edges = [round(edge * 128 / side) for edge in range(side + 1)]
        for row in range(side):
            for column in range(side):
                part = image[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
                areas = {color: int(is_color(part, color).sum()) for color in COLORS}
                cell = grid.cells[row][column]
                assert {color for color, area in areas.items() if area} == ({cell.color} if cell else set())
                assert cell is None or areas[cell.color] >= 60
    assert num_checked > 5_000


def test_a_grid_by_hand() -> None:
    cells = [["red circle", "blue star", None], ["red star", "red circle", "teal cross"], [None, None, "blue star"]]
    grid = grids.Grid((255, 255, 255), tuple(tuple(c and grids.Cell(*c.split()) for c in line) for line in cells))
    answers = dict(pair for listing in grids.KINDS.values() for pair in listing(grid))
    assert answers["how many red shapes are there?"] == "3"
    assert answers["how many crosses are there?"] == "1"
    assert answers["how many blue crosses are there?"] == "0"
    assert answers["what color is the shape in row 2, column 3?"] == "teal"
    assert answers["is the teal cross right of the red star?"] == "yes"
    assert "is the teal cross above the red star?" not in answers  # the same row
    assert "is the teal cross right of the red circle?" not in answers  # two red circles
    assert answers["what shape is directly left of the teal cross?"] == "circle"
    assert answers["are there more circles than stars?"] == "no"


# --- charts ---


def chart_answer(values: dict[str, int], text: str) -> str:
    named = [word for word in text.rstrip("?").split() if word in values]
    if text == "how many bars are there?":
        return str(len(values))
    if found := re.fullmatch(r"what color is the (tallest|second tallest|shortest) bar\?", text):
        height = sorted(values.values())[{"tallest": -1, "second tallest": -2, "shortest": 0}[found[1]]]
        (color,) = [color for color, value in values.items() if value == height]
        return color
    if text.startswith("is the"):
        return "yes" if values[named[0]] > values[named[1]] else "no"
    if text.startswith("how much"):
        return str(values[named[0]] - values[named[1]])
    assert text.startswith("what is the value")
    return str(values[named[0]])


def test_charts_are_answered_from_their_pixels() -> None:
    for seed in SEEDS:
        chart = charts.compose(random.Random(seed))
        image = pixels(charts.draw(chart))
        values = {}
        for color in COLORS:
            rows, columns = np.nonzero(is_color(image, color))
            if len(rows):
                values[color] = (int(rows.max() - rows.min())) / charts.UNIT_PX
                assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # one whole, unhidden bar
        values = {color: int(value) for color, value in values.items() if value == int(value)}
        assert len(values) in (3, 4, 5)
        check_candidates(charts.KINDS, chart, lambda text, values=values: chart_answer(values, text))


# --- digits ---


def digit_answer(table: np.ndarray, text: str) -> str:
    numbers = [int(number) for number in re.findall(r"\d", text)]
    if text.startswith("which digit"):
        return str(table[numbers[0] - 1, numbers[1] - 1])
    if text.startswith("what is the sum"):
        return str((table if "row" in text else table.T)[numbers[0] - 1].sum())
    if text.startswith("how many times"):
        return str((table == numbers[0]).sum())
    part = table[numbers[0] - 1] if numbers else table
    return str(part.max() if "largest" in text else part.min())


def test_digits() -> None:
    for seed in SEEDS:
        scene = digits.compose(random.Random(seed))
        check_candidates(digits.KINDS, scene, lambda text, t=np.array(scene.values): digit_answer(t, text))
        image, side = pixels(digits.draw(scene)), len(scene.values)
        edges = [round(edge * 128 / side) for edge in range(side + 1)]
        for border in edges[1:-1]:  # no digit crosses a ruled line
            assert (image[border] > 150).all()
            assert (image[:, border] > 150).all()


# --- diagrams ---


def diagram_answer(arrows: set[tuple[str, str]], colors: dict[str, str], text: str) -> str:
    letters = re.findall(r"\b[A-E]\b", text)
    after = [second for first, second in arrows if first == letters[0]]
    if text.startswith("does"):
        return "yes" if tuple(letters) in arrows else "no"
    if text.startswith("how many"):
        return str(sum(second == letters[0] for _, second in arrows))
    if text.startswith("starting"):
        (third,) = [second for first, second in arrows if first == after[0]]
        return third
    (target,) = after
    return colors[target] if text.startswith("what color") else target


def has_head(image: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> bool:
    """More ink a little before the end than a line of 2 pixels alone would leave."""
    along = np.subtract(end, start) / np.hypot(*np.subtract(end, start))
    x, y = np.array(end) - along * (diagrams.NODE_PX + 5.5)
    rows, columns = np.ogrid[:128, :128]
    is_near = (rows - y) ** 2 + (columns - x) ** 2 <= 3.5**2
    return ((image == diagrams.INK).all(-1) & is_near).sum() >= 22


def test_diagrams_are_answered_from_their_arrow_heads() -> None:
    for seed in SEEDS:
        scene = diagrams.compose(random.Random(seed))
        image = pixels(diagrams.draw(scene))
        arrows = set()
        for a in scene.nodes:
            assert is_color(image, a.color)[int(a.center[1]) + 10, int(a.center[0])]
            for b in scene.nodes:
                if a is not b and has_head(image, a.center, b.center):
                    arrows.add((a.letter, b.letter))
        assert arrows == set(scene.next().items())
        colors = {node.letter: node.color for node in scene.nodes}
        check_candidates(diagrams.KINDS, scene, lambda text, a=arrows, c=colors: diagram_answer(a, c, text))


# --- asking ---


def test_asking_is_balanced_and_choices_hold_their_answer() -> None:
    answers: dict[str, Counter] = {}
    letters: Counter[str] = Counter()
    for seed in range(400):
        rng = random.Random(seed)
        scene = grids.compose(rng)
        truth = dict(pair for listing in grids.KINDS.values() for pair in listing(scene))
        asked = ask(rng, scene, grids.KINDS)
        assert len({question.text for question in asked}) == len(asked) == 6
        for question in asked:
            if question.form == "choice":
                text, *options, request = question.text.split("\n")
                assert request == CHOICE_REQUEST
                chosen = [option[3:] for option in options if option[0] == question.answer]
                assert chosen == [truth[text]]
                assert len({option[3:] for option in options}) == len(options) in (3, 4)
                letters[question.answer] += 1
            else:
                assert truth[question.text] == question.answer
                assert (question.form == "yes_no") == (question.answer in ("yes", "no"))
                answers.setdefault(question.kind, Counter())[question.answer] += 1
    for kind in ("scene_exists", "scene_relation", "scene_compare"):
        assert 0.4 < answers[kind]["yes"] / answers[kind].total() < 0.6
    assert max(answers["scene_color_at"].values()) < 0.25 * answers["scene_color_at"].total()
    assert letters["A"] == pytest.approx(letters["C"], rel=0.4)


# --- the prepared folder ---


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("source", SOURCES)
def test_made_again_it_has_the_same_bytes_and_no_picture_in_two_splits(tmp_path: Path, source: str) -> None:
    info = prepare(source, tmp_path / "a", seed=3, **SMALL)
    prepare(source, tmp_path / "b", seed=3, **SMALL)
    files = tree(tmp_path / "a")
    assert files == tree(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # no staging folder stays
    num_parts = 2 if source in ("mix", "toy") else 1
    num_images = {"train": 40 * num_parts, "val": 20 * num_parts, "test": 20 * num_parts}
    if source == "toy":
        num_images["train_questions"] = num_images["train"]
    assert info.num_images == num_images
    pictures_of: dict[str, set[str]] = {}
    ids: list[str] = []
    for split in num_images:
        rows = [json.loads(line) for line in (tmp_path / "a" / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == info.num_rows[split]
        ids += [row["id"] for row in rows]
        pictures_of[split] = {files[row["image"]] for row in rows}
        report = check_file(tmp_path / "a" / f"{split}.jsonl")
        assert (report.faults, report.num_images) == ((), info.num_images[split])
    assert len(ids) == len(set(ids)) == sum(info.num_rows.values())
    assert source == "toy" or len(ids) == sum(info.num_questions.values())
    more = pictures_of.pop("train_questions", pictures_of["train"])
    assert more == pictures_of["train"]
    assert len(set.union(*pictures_of.values())) == sum(num_images[split] for split in pictures_of)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["rows_sha256"] == {name: files[f"{name}.jsonl"] for name in num_images}
    assert tree(tmp_path / "a") != tree(prepare(source, tmp_path / "c", seed=4, **SMALL).out)


def test_scenes_ask_every_kind_and_picture_17_does_not_depend_on_the_sizes(tmp_path: Path) -> None:
    info = prepare("scenes", tmp_path / "a", **SMALL)
    assert set(info.num_questions) == set(scenes.KINDS)
    prepare("scenes", tmp_path / "b", **{**SMALL, "num_train_images": 20})
    name = "images/scene-train-00017.png"
    assert tree(tmp_path / "a")[name] == tree(tmp_path / "b")[name]


def test_easy_vqa_is_complete_and_a_mosaic_uses_its_own_split(tmp_path: Path) -> None:
    info = prepare("easy-vqa", tmp_path / "easy")
    assert sum(info.num_images.values()) == 5_000
    assert sum(info.num_rows.values()) == 48_248
    assert (info.num_images["test"], info.num_rows["test"]) == (1_000, 9_673)
    numbers = {split: {tile.tile for tile in tiles} for split, tiles in easy_vqa.read_tiles(0).items()}
    assert not numbers["train"] & numbers["val"]
    stored = {path.read_bytes() for path in (tmp_path / "easy" / "images").glob("easy-val-*")}
    assert all(tile.read_bytes() in stored for tile in numbers["val"])


def test_refusals_are_one_line_and_leave_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    cases = {
        f"{out} already exists; choose another path or pass --overwrite": ("easy-vqa", {}),
        "unknown source 'coco'; choose one of easy-vqa, scenes, mix, toy": ("coco", {}),
        "unknown size 'num_images'; choose among num_train_images, num_val_images, num_test_images": (
            "scenes",
            {"num_images": 3},
        ),
        "num_val_images=-1: a number of pictures is expected, 0 or more": ("scenes", {"num_val_images": -1}),
        "num_test_images=1001: easy-vqa has 1000 pictures there; ask for fewer": (
            "easy-vqa",
            {"num_test_images": 1001, "overwrite": True},
        ),
    }
    for message, (source, options) in cases.items():
        with pytest.raises(CheckpointError if "already exists" in message else ConfigError) as caught:
            prepare(source, out, **options)
        assert str(caught.value) == message
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    easy_vqa._read_package.cache_clear()
    with pytest.raises(ConfigError) as caught:
        prepare("easy-vqa", out, overwrite=True)
    message = "the source easy-vqa needs its package, which is not installed; pip install easy-vqa"
    assert str(caught.value) == message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "keep"


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    prepare("easy-vqa", out, overwrite=True, **SMALL)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "images", "manifest.json", "test.jsonl", "train.jsonl", "val.jsonl",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_chosen_questions_are_the_first_of_each_part(tmp_path: Path) -> None:
    prepare("toy", tmp_path / "toy", **SMALL)
    rows = (tmp_path / "toy" / "test.jsonl").read_text().splitlines()
    easy = [row for row in rows if '"kind": "easy_' in row]
    scenes_rows = [row for row in rows if '"kind": "easy_' not in row]
    chosen = choose_questions(tmp_path / "toy" / "test.jsonl", 7, 11).decode().splitlines()
    assert chosen == easy[:7] + scenes_rows[:11]


def test_the_second_stage_asks_many_short_rows_of_what_can_be_asked(tmp_path: Path) -> None:
    prepare("toy", tmp_path / "toy", **SMALL)
    rows = [json.loads(line) for line in (tmp_path / "toy" / "train_questions.jsonl").read_text().splitlines()]
    by_picture: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        turns = row["conversations"]
        assert 2 <= len(turns) <= 8
        assert turns[0]["value"].startswith("<image>\n")
        pairs = zip(turns[::2], turns[1::2], strict=True)
        by_picture.setdefault(row["image"], []).extend((q["value"], a["value"]) for q, a in pairs)
    scene_counts = [len(asked) for image, asked in by_picture.items() if "scene" in image]
    assert len(scene_counts) == SMALL["num_train_images"]
    assert max(scene_counts) == 20
    assert min(scene_counts) >= 12
    for asked in by_picture.values():
        texts = [text.removeprefix("<image>\n").split("\n")[0] for text, _ in asked]
        assert len(set(texts)) == len(texts)


def test_the_working_folder_itself_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert prepare("scenes", Path("."), overwrite=True, **SMALL).num_images["train"] == 40
    assert os.listdir(tmp_path) == ["here"]
    assert (tmp_path / "here" / "train.jsonl").is_file()
