"""The page of a comparison: it stands alone, says what results.json says, and trusts no text and no path in it."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from grace_vlm.errors import CheckpointError, DataError
from grace_vlm.evals import charts
from grace_vlm.evals.report import (
    MAX_PICTURE_BYTES,
    AnswerLine,
    Row,
    best_row,
    choose_examples,
    embed_picture,
    headline,
    read_results,
    render_report,
)

PNG = b"\x89PNG\r\n\x1a\n" + b"not really pixels: nothing here may decode them"
EVIL = "<script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>"
KINDS = ("count", "color", "shape", "relation", "yes_no")
NUM_QUESTIONS = 60


def row(name: str, scheme: str, num_correct: int, **changes: Any) -> dict[str, Any]:
    accuracy = num_correct / NUM_QUESTIONS
    return {
        "name": name,
        "label": f"Label of {name}",
        "method": "sft",
        "scheme": scheme,
        "path": name,
        "num_parameters": 2_719_104,
        "num_correct": num_correct,
        "num_scored": NUM_QUESTIONS,
        "accuracy": accuracy,
        "low": max(0.0, accuracy - 0.0612345),
        "high": min(1.0, accuracy + 0.0598765),
        "bytes": 8_412_345 + num_correct,
        "bits_per_weight": 16.0 if scheme == "bf16" else 5.314,
        "agreement": 0.8312345,
        "difference": accuracy - 0.75,
        "difference_low": accuracy - 0.8,
        "difference_high": accuracy - 0.7,
        "p_value": 0.01234,
        "kinds": {kind: [num_correct // 5, 12] for kind in KINDS},
        "answers": f"answers/{name}.jsonl",
        "metrics": None,
        **changes,
    }


def answers(name: str) -> list[dict[str, Any]]:
    """Row i of a model whose name has n letters is right if i % n is not 0: models disagree now and then."""
    return [
        {
            "row": i,
            "id": f"q{i}",
            "kind": KINDS[i % len(KINDS)],
            "image": f"images/{i % 4}.png",
            "question": f"how many, number {i}?",
            "gold": "3",
            "answer": "3" if i % len(name) else f"{name} errs",
            "correct": bool(i % len(name)),
        }
        for i in range(NUM_QUESTIONS)
    ]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def full_results() -> dict[str, Any]:
    nothing = dict.fromkeys(("agreement", "difference", "difference_low", "difference_high", "p_value"))
    modules = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
    return {
        "format_version": 1,
        "title": "A comparison",
        "created": "2026-11-23",
        "command": "grace demo",
        "hardware": "2 cores",
        "versions": {"torch": "2.14.1"},
        "data": {"path": "data/questions.jsonl", "root": "data", "num_questions": NUM_QUESTIONS},
        "baseline": "student",
        "rows": [
            row("teacher", "bf16", 54),
            row("student", "bf16", 45, **nothing),
            row("rtn_w4", "w4g128", 40),
            row("grace_w4", "w4g128", 46, metrics="training/grace_w4/metrics.jsonl"),
            row("packed", "w4g128", 46, bytes=1_812_345),
            row("rtn_w2", "w2g128", 10),
        ],
        "layers": {
            "rtn_w4": {name: 0.08 + 0.001 * i for i, name in enumerate(modules)},
            "grace_w4": {name: 0.11 + 0.001 * i for i, name in enumerate(modules)},
            "packed": {name: 0.11 + 0.001 * i for i, name in enumerate(modules)},
        },
        "gate": {"teacher": "teacher", "points": [[0.02 * i, math.exp(-0.01 * i), int(i < 50)] for i in range(60)]},
        "checks": [
            {"name": "images in the relation loss", "value": "100 %", "passed": True},
            {"name": "packed answers as trained", "value": "99 %", "passed": False},
        ],
    }


def write_folder(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    for entry in results["rows"]:
        write_lines(folder / "answers" / f"{entry['name']}.jsonl", answers(entry["name"]))
    metrics = [
        {"step": i, "loss": 1.0, "cross_entropy": 1 + 1 / (i + 1), "distillation": 2 / (i + 1), "relational": None}
        for i in range(40)
    ]
    write_lines(folder / "training" / "grace_w4" / "metrics.jsonl", metrics)
    (folder / "data" / "images").mkdir(parents=True, exist_ok=True)
    for i in range(4):
        (folder / "data" / "images" / f"{i}.png").write_bytes(PNG + bytes([i]))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "demo", full_results())


class Page(HTMLParser):
    """Tags with attributes, the visible text of each section, and the exact numbers of each row of the table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.numbers: dict[str, list[float]] = {}
        self._section, self._row = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "section":
            self._section = found["id"] or ""
        if tag == "tr":
            self._row = found.get("data-row") or ""
        if tag == "data" and self._row:
            self.numbers.setdefault(self._row, []).append(float(found["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("section", "tr"):
            self._section, self._row = ("" if tag == "section" else self._section), ""

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data


def rendered(folder: Path) -> Page:
    path = render_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def change(folder: Path, **changes: Any) -> None:
    (folder / "results.json").write_text(json.dumps({**full_results(), **changes}))


# -- the page as a whole ----------------------------------------------------------------------------------------------


def test_the_page_stands_alone(folder: Path) -> None:
    page = rendered(folder)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "audio", "video")]
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "xlink:href", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:", "#"))
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_same_files_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    first = render_report(folder).read_bytes()
    assert render_report(folder).read_bytes() == first
    elsewhere = write_folder(tmp_path / "elsewhere", full_results())
    assert render_report(elsewhere).read_bytes() == first


def test_numbers_in_the_table_are_those_of_results_json(folder: Path) -> None:
    page = rendered(folder)
    results = full_results()
    assert list(page.numbers) == [entry["name"] for entry in results["rows"]]
    for entry in results["rows"]:
        keys = ("num_parameters", "accuracy", "low", "high", "bytes", "bits_per_weight")
        keys += ("agreement", "difference", "difference_low", "difference_high", "p_value")
        assert page.numbers[entry["name"]] == [entry[key] for key in keys if entry[key] is not None]
        assert entry["label"] in page.sections["models"]
        assert f"{100 * entry['accuracy']:.2f}\u00a0%" in page.sections["models"]
    assert "p = 0.012" in page.sections["models"]


def test_every_section_is_there_and_none_is_left_out(folder: Path) -> None:
    page = rendered(folder)
    order = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert order == ["models", "checks", "size", "kinds", "curves", "layers", "gate", "examples"]
    assert "left out" not in "".join(page.sections.values())
    assert "1 of 2 hold" in page.sections["checks"]
    assert "Label of grace_w4 = Label of packed" in page.sections["layers"]
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 20
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 20


def test_each_chart_has_a_title_and_each_picture_a_text(folder: Path) -> None:
    html = render_report(folder).read_text(encoding="utf-8")
    drawn = re.findall(r"(<svg\b[^>]*>)(.{0,7})", html)
    assert len(drawn) > 20
    for opening, inner in drawn:
        assert inner == "<title>" or 'aria-hidden="true"' in opening
    assert all(attrs.get("alt") for tag, attrs in Page(html).tags if tag == "img")


# -- strangers' texts and paths ---------------------------------------------------------------------------------------


def test_strangers_texts_stay_texts(folder: Path) -> None:
    results = full_results()
    results["title"] = results["rows"][3]["label"] = results["command"] = EVIL
    results["rows"][3]["kinds"] = {EVIL: [1, 2]}
    results["layers"]["rtn_w4"] = {EVIL: 0.5, 'a"b': 0.25}
    results["checks"][0].update(name=EVIL, value=EVIL)
    change(folder, **results)
    evil = {"question": EVIL, "gold": EVIL, "answer": EVIL, "id": '"><script>', "kind": EVIL}
    write_lines(folder / "answers" / "rtn_w4.jsonl", [{**line, **evil} for line in answers("rtn_w4")])
    write_lines(folder / "answers" / "teacher.jsonl", [{**line, **evil} for line in answers("teacher")])
    page = rendered(folder)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")  # type: ignore[union-attr]
    assert EVIL in page.sections["examples"]
    assert EVIL in page.sections["models"]
    assert EVIL in page.sections["checks"]


def test_a_long_or_strange_answer_is_cut_and_cleaned() -> None:
    assert charts.clipped("a\x00b\u202ec\nd") == "a b c\nd"
    assert charts.clipped("x" * 1000) == "x" * 240 + "…"
    assert charts.clipped("  \t ") == ""


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "images/../../secret.png", "link.png", "linked/s.png"]
)
def test_a_picture_outside_the_root_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "s.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path / "beside")
    with pytest.raises(DataError, match=r"^its path leads out of the folder$"):
        embed_picture(root, name)


def test_a_picture_is_copied_only_if_it_is_one_and_small(tmp_path: Path) -> None:
    contents = {
        "a.png": (PNG, None),
        "b.jpg": (b"\xff\xd8\xff\xe0rest", None),
        "c.webp": (b"RIFF\x00\n\x00\x00WEBPrest", None),
        "d.svg": (b"<svg onload=alert(1)>", "it is no PNG, JPEG or WebP"),
        "e.png": (b"", "it is no PNG, JPEG or WebP"),
        "f.wav": (b"RIFF\x00\x00\x00\x00WAVE", "it is no PNG, JPEG or WebP"),
        "g.png": (PNG.ljust(MAX_PICTURE_BYTES, b"x"), None),
        "h.png": (PNG.ljust(MAX_PICTURE_BYTES + 1, b"x"), "it is larger than 200,000 bytes"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        if reason is None:
            assert embed_picture(tmp_path, name).startswith("data:image/")
        else:
            with pytest.raises(DataError, match=f"^{reason}$"):
                embed_picture(tmp_path, name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe.png", "absent.png", ".", "loop", "a\x00b.png", "x" * 5000):
        with pytest.raises(DataError):
            embed_picture(tmp_path, name)


def test_a_refused_picture_is_said_and_the_question_still_shown(folder: Path) -> None:
    (folder / "data" / "images" / "1.png").write_bytes(b"GIF89a")
    (folder / "data" / "images" / "2.png").unlink()
    page = rendered(folder)
    assert "picture left out: it is no PNG, JPEG or WebP" in page.sections["examples"]
    assert "picture left out: there is no such file" in page.sections["examples"]
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 20


def test_answers_outside_the_folder_are_not_shown(folder: Path) -> None:
    results = full_results()
    write_lines(folder.parent / "elsewhere.jsonl", answers("elsewhere"))
    results["rows"][0]["answers"] = "../elsewhere.jsonl"
    change(folder, **results)
    page = rendered(folder)
    assert "Answers of Label of teacher are not shown: its path leads out of the folder." in page.sections["examples"]
    assert "elsewhere errs" not in page.sections["examples"]


# -- parts that are missing -------------------------------------------------------------------------------------------


def test_missing_parts_leave_their_section_out_and_say_why(tmp_path: Path) -> None:
    results = full_results()
    for entry in results["rows"]:
        entry.update(answers=None, metrics=None, kinds={})
    for key in ("layers", "gate", "checks", "versions"):
        del results[key]
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = rendered(tmp_path)
    said = {name: text for name, text in page.sections.items() if "left out" in text}
    assert set(said) == {"kinds", "curves", "layers", "gate", "examples"}
    assert "Kinds are left out: no row of results.json counts its answers by kind." in said["kinds"]
    assert "Loss curves are left out: no row was trained here, so none has a training diary." in said["curves"]
    assert "results.json has no quantized row with an error above 0." in said["layers"]
    assert "Teacher entropy and gate are left out: no teacher took part." in said["gate"]
    assert "Examples are left out: no answers could be read." in said["examples"]
    assert "checks" not in page.sections


def test_unreadable_parts_are_named(folder: Path) -> None:
    (folder / "training" / "grace_w4" / "metrics.jsonl").unlink()
    (folder / "answers" / "teacher.jsonl").write_text('{"row": 0}\n{}\n')
    change(folder, gate={"teacher": "teacher", "points": [[0.1, 0.9, 1]] * 3})
    page = rendered(folder)
    assert "Label of grace_w4 is not drawn: metrics.jsonl is not there." in page.sections["curves"]
    assert "line 1 of teacher.jsonl is unusable: id: Field required" in page.sections["examples"]
    assert "only 3 questions have a gate" in page.sections["gate"]


def test_a_last_line_that_a_kill_cut_short_is_left_out(folder: Path) -> None:
    path = folder / "training" / "grace_w4" / "metrics.jsonl"
    whole = render_report(folder).read_bytes()
    path.write_text(path.read_text() + '{"step": 40, "cross_en')
    assert render_report(folder).read_bytes() == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read {path}: No such file or directory; expected a JSON file"),
        ("[1]", "{path} holds a JSON list; expected an object"),
        ('{"a": NaN}', "{path} is no usable JSON: NaN is no JSON number"),
        ("{", "{path} is no usable JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"format_version": 2}', "{path} is no result of a comparison: format_version: Input should be 1"),
    ],
)
def test_results_that_cannot_be_used_are_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    (tmp_path / "report.html").write_text("of before")
    with pytest.raises(DataError) as caught:
        render_report(tmp_path)
    assert str(caught.value) == message.format(path=path)
    assert (tmp_path / "report.html").read_text() == "of before"


def test_results_with_wrong_rows_are_one_line(folder: Path) -> None:
    path = folder / "results.json"
    change(folder, rows=[row("a", "bf16", 3, accuracy=1.5)], baseline="a")
    with pytest.raises(DataError, match=r"rows\.0\.accuracy: Input should be less than or equal to 1$"):
        read_results(path)
    expected = "expected one row a model, one the baseline$"
    change(folder, rows=[row("a", "bf16", 3)], baseline="b")
    with pytest.raises(DataError, match=f"has rows a and baseline 'b'; {expected}"):
        read_results(path)
    change(folder, rows=[row("a", "bf16", 3), row("a", "bf16", 3), row("b", "bf16", 3)], baseline="b")
    with pytest.raises(DataError, match=f"has rows a, a, b and baseline 'b'; {expected}"):
        read_results(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_page_is_replaced_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (folder / "report.html").write_text("of before")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        render_report(folder)
    assert (folder / "report.html").read_text() == "of before"
    assert not [path for path in folder.iterdir() if path.name.startswith(".partial")]


# -- what the page says -----------------------------------------------------------------------------------------------


def test_the_headline_is_computed(folder: Path) -> None:
    results = read_results(folder / "results.json")
    best = best_row(results)
    assert best.name == "packed"  # as accurate as grace_w4, with fewer bytes
    baseline = results.rows[1]
    assert headline(best, baseline) == (
        "Label of packed answers 76.7\u00a0% of 60 questions correctly, 1.7 points above Label of student "
        "(95\u00a0% interval −3.3 to +6.7 points)."
    )
    same = best.model_copy(update={"difference": -0.0004, "difference_low": None})
    assert headline(same, baseline).endswith("correctly, as many as Label of student.")
    assert headline(baseline, baseline) == "Label of student answers 75.0\u00a0% of 60 questions correctly."
    page = rendered(folder)
    assert "It is the most accurate of 3 INT4 rows." in page.sections[""]
    assert "The interval includes zero: these questions cannot tell the two apart." in page.sections[""]


def test_one_row_alone_makes_a_page(tmp_path: Path) -> None:
    change_to = full_results()
    nothing = dict.fromkeys(("agreement", "difference", "difference_low", "difference_high", "p_value"))
    only = row("student", "", 60, low=1.0, high=1.0, kinds={"": [0, 0]}, bytes=0, **nothing)
    change_to.update(rows=[only], layers={"student": {"lm_head": 0.0}})
    page = rendered(write_folder(tmp_path / "one", change_to))
    assert list(page.numbers) == ["student"]
    assert "100.00" in page.sections["models"]


def line(number: int, kind: str, answer: str, correct: bool) -> AnswerLine:
    return AnswerLine(row=number, id="", kind=kind, question="", gold="", answer=answer, correct=correct)


def test_examples_are_the_disputed_ones_of_many_kinds() -> None:
    one = Row.model_validate(row("a", "bf16", 1))
    votes = {  # row: (kind, who is right)
        0: ("x", "1111"),
        1: ("x", "1100"),
        2: ("x", "1110"),
        3: ("y", "0000"),
        4: ("y", "1000"),
        5: ("z", "1111"),
    }
    asked = {
        number: [(i, one, line(number, kind, flag, flag == "1")) for i, flag in enumerate(flags)]
        for number, (kind, flags) in votes.items()
    }
    assert choose_examples(asked) == [1, 4, 5, 2, 3, 0]
    assert choose_examples(asked, limit=2) == [1, 4]
    assert choose_examples(dict(reversed(asked.items()))) == [1, 4, 5, 2, 3, 0]
    assert choose_examples({}) == []


# -- charts -----------------------------------------------------------------------------------------------------------


def test_quantile_bins_keep_equal_values_together_and_lose_none() -> None:
    points = [(0.0, 0)] * 55 + [(0.1 * i, i % 2) for i in range(1, 46)]
    bins = charts.quantile_bins(points)
    assert sum(b.num for b in bins) == 100
    assert sum(b.num_wrong for b in bins) == sum(wrong for _, wrong in points)
    assert bins[0].num >= 55
    assert bins[0].mean == pytest.approx(sum(0.1 * i for i in range(1, bins[0].num - 54)) / bins[0].num)
    assert [b.mean for b in bins] == sorted(b.mean for b in bins)
    assert all(b.low <= b.num_wrong / b.num <= b.high for b in bins)
    assert [b.num for b in charts.quantile_bins([(float(i), 0) for i in range(100)])] == [10] * 10


def test_smoothing_is_a_mean_of_what_is_there() -> None:
    assert charts.smoothed([1.0, 2.0, 3.0, 4.0], 1) == [1.0, 2.0, 3.0, 4.0]
    assert charts.smoothed([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]
    assert charts.smoothed([2.0] * 50, 9) == [2.0] * 50


def test_axes_map_ends_to_ends_and_ticks_lie_within() -> None:
    for axis in (charts.Axis(0.2, 0.9, 10, 110), charts.Axis(3e-3, 4e2, 110, 10, log=True)):
        assert axis.at(axis.low) == pytest.approx(axis.start)
        assert axis.at(axis.high) == pytest.approx(axis.stop)
        assert axis.at(axis.high * 9) == pytest.approx(axis.stop)
        for count in (3, 5, 9):
            ticks = axis.ticks(count)
            assert 2 <= len(ticks) <= count + 1
            assert all(axis.low * (1 - 1e-9) <= tick <= axis.high * (1 + 1e-9) for tick in ticks)
    assert charts.Axis(0.061, 0.069, 0, 100, log=True).ticks(4)


def test_labels_of_a_crowded_scatter_do_not_cover_each_other() -> None:
    points = [charts.Point(f"model {i} W4", i, 2e6, 0.80 + 0.004 * i, 0.79, 0.83) for i in range(5)]
    points += [charts.Point("student", 5, 5e6, 0.81, 0.8, 0.82), charts.Point("teacher", 6, 2e7, 0.9, 0.89, 0.91)]
    for width, height in ((980, 430), (350, 380)):
        svg = charts.scatter(points, width, height)
        found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="name c\d">([^<]+)<', svg)
        assert len(found) == len(points)
        boxes = []
        for x, y, anchor, label in found:
            left = float(x) - (6 * len(label) if anchor == "end" else 0)
            boxes.append((left, float(y) - 9, left + 6 * len(label), float(y) + 2))
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_words_for_numbers() -> None:
    assert charts.percent(0.875) == "87.50\u00a0%"
    assert [charts.signed(v) for v in (0.0031, -0.012, 0.0, -0.00001)] == ["+0.31", "−1.20", "0.00", "0.00"]
    assert charts.size(8_412_345) == "8.41\u00a0MB"
    assert [charts.p_text(p) for p in (0.0, 0.0009, 0.0125, 1.0)] == [
        "p < 0.001",
        "p < 0.001",
        "p = 0.013",
        "p = 1.000",
    ]
    assert [charts.short(v) for v in (0.25, -2.0, 1234.0, 1e-7)] == ["0.25", "−2", "1,234", "1e−7"]
