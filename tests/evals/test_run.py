"""Evaluation: the same answers in every batch size, and from the packed folder as from the trained one."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_run import recipe_tree, write_models, write_rows
from worlds import stock_tokens

from grace_vlm.engine.cache import PAGE_TOKENS
from grace_vlm.engine.engine import Engine
from grace_vlm.engine.open import open_model
from grace_vlm.errors import DataError
from grace_vlm.evals.compare import Comparison, Contestant, gate_points
from grace_vlm.evals.run import (
    EXACT,
    Answer,
    QuestionFile,
    answer_all,
    open_engine,
    read_answers,
    score,
    write_answers,
)
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import converters
from grace_vlm.losses.gdkd import confidence_gate
from grace_vlm.models.load import load_model
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained W4 student with its packed twin."""
    folder = tmp_path_factory.mktemp("evals")
    write_rows(folder)
    write_models(folder)
    tree = recipe_tree(folder, optim__num_steps=12, runtime__checkpoint_every_steps=0)
    train(recipe_from(tree, "test"), folder / "run")
    pack(folder / "run", folder / "packed", "compressed-tensors")
    return folder


def questions_and_engine(
    folder: Path, rows: Path, *, limit: int | None = None, dense: bool = False, max_new_tokens: int = 16, **options: Any
) -> tuple[QuestionFile, Engine]:
    """``dense``: as if it had no codes; the engine then runs bf16(q s), as Transformers does."""
    loaded, codes = open_model(str(folder), "cpu")
    questions = QuestionFile(rows, loaded, limit=limit)
    sizes = replace(EXACT, **options)
    return questions, open_engine(loaded, {} if dense else codes, questions, sizes, max_new_tokens)


def test_answers_do_not_depend_on_the_batch(world: Path) -> None:
    found = []
    for options in ({"max_running": 1}, {"max_running": 7, "picture_bytes": 0}, {"max_running": 64}):
        questions, engine = questions_and_engine(world / "run", world / "rows.jsonl", **options)
        done: list[tuple[int, int]] = []
        found.append(
            answer_all(engine, questions, max_new_tokens=6, progress=lambda n, of, done=done: done.append((n, of)))
        )
        assert done[-1] == (24, 24)
        assert done == sorted(done)
        assert not engine.has_work
        assert engine.pages.num_free == engine.pages.num_pages
    assert found[0] == found[1] == found[2]
    assert [answer.row for answer in found[0]] == list(range(24))
    assert found[0][0].question == "what color is the square?"


def test_greedy_equals_transformers_generate(world: Path) -> None:
    questions, engine = questions_and_engine(world / "run", world / "rows.jsonl", limit=8, dense=True)
    ours = [answer.answer for answer in answer_all(engine, questions, max_new_tokens=5)]
    loaded = load_model(str(world / "run"), "cpu")
    for number, answer in enumerate(ours):
        paths = [world / "images" / f"{number}.png"]
        tokens = stock_tokens(loaded, "what color is the square?", paths, 5)
        assert loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True) == answer


def test_a_model_may_have_several_closing_tokens(world: Path) -> None:
    """Qwen3-VL's generation config lists two; one id and a list of ids stop alike."""
    questions, engine = questions_and_engine(world / "run", world / "rows.jsonl", limit=3)
    one = answer_all(engine, questions, max_new_tokens=5)
    loaded, codes = open_model(str(world / "run"), "cpu")
    tokenizer = loaded.processor.tokenizer
    loaded.model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert answer_all(open_engine(loaded, codes, questions), questions, max_new_tokens=5) == one


def test_questions_of_one_picture_follow_one_another(world: Path, tmp_path: Path) -> None:
    """So each picture is seen once, though an engine may keep little of them."""
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()[:6]]
    again = [row | {"id": f"{row['id']}-{turn}"} for turn in range(3) for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again))
    loaded, codes = open_model(str(world / "run"), "cpu")
    questions = QuestionFile(tmp_path / "rows.jsonl", loaded, root=world)
    assert questions.order() == [0, 6, 12, 1, 7, 13, 2, 8, 14, 3, 9, 15, 4, 10, 16, 5, 11, 17]
    engine = open_engine(loaded, codes, questions, replace(EXACT, max_running=3, picture_bytes=1 << 20))
    answers = answer_all(engine, questions, max_new_tokens=2)
    assert [answer.row for answer in answers] == list(range(18))
    assert engine.pictures.num_made == 6


def test_a_cache_has_room_for_the_longest_question(world: Path) -> None:
    questions, small = questions_and_engine(world / "run", world / "rows.jsonl", cache_tokens=16)
    longest = max(sample.num_tokens for _, sample in questions.entries) + 16
    assert longest <= small.pages.num_pages * PAGE_TOKENS < longest + PAGE_TOKENS
    assert len(answer_all(small, questions)) == 24
    _, many = questions_and_engine(world / "run", world / "rows.jsonl", max_running=4)
    assert many.pages.num_pages == 4 * small.pages.num_pages


def test_a_question_that_is_too_long_is_named(world: Path) -> None:
    with pytest.raises(DataError) as caught:
        questions_and_engine(world / "run", world / "rows.jsonl", max_new_tokens=2040)
    assert re.fullmatch(
        r"row 0 \('r0'\) has a prompt of \d+ tokens and an answer may have 2,040; the model takes 2,048 in all: "
        r"shorten one of them",
        str(caught.value),
    )


def test_gates_of_a_teacher_are_those_of_transformers_logits(world: Path, tmp_path: Path) -> None:
    comparison = Comparison(world / "rows.jsonl", tmp_path, "student", teacher="teacher")
    comparison.add(Contestant("student", "student", world / "student", "sft", "bf16"))
    assert not comparison.gate_points
    comparison.add(Contestant("teacher", "teacher", world / "teacher", "sft", "bf16"))
    loaded = load_model(str(world / "teacher"), "cpu")
    content = [{"type": "image"}, {"type": "text", "text": "what color is the square?"}]
    text = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answers = comparison.answers["teacher"]
    assert len(comparison.gate_points) == len(answers) == 24
    for number in (0, 11, 23):
        inputs = loaded.processor(
            text=[text], images=[Image.open(world / "images" / f"{number}.png")], return_tensors="pt"
        )
        with torch.no_grad():
            logits = loaded.model(**inputs).logits[:, -1]
        entropy, gate, correct = comparison.gate_points[number]
        assert entropy == pytest.approx(float(torch.distributions.Categorical(logits=logits).entropy()), abs=1e-4)
        assert gate == pytest.approx(float(confidence_gate(logits)), abs=1e-5)
        assert correct == answers[number].correct


def test_an_answer_without_a_token_has_no_gate() -> None:
    answers = [Answer(row, f"{row}", "", None, "q", "a", "", row == 2) for row in range(3)]
    points = gate_points(answers, {0: 1.5, 2: 0.0}, 320)
    assert points == [[1.5, pytest.approx(math.exp(-1.5 / math.log(320))), 0], [0.0, 1.0, 1]]


def test_every_layout_is_compared(world: Path, tmp_path: Path) -> None:
    comparison = Comparison(world / "rows.jsonl", tmp_path / "out", "run", teacher=None)
    comparison.add(Contestant("run", "trained", world / "run", "grace", "w4g128"))
    for name in converters():
        if name != "grace":
            pack(world / "run", tmp_path / name, name)
            comparison.add(Contestant(name, name, tmp_path / name, "grace", "w4g128"))
    base, *others = comparison.rows
    assert 4 < base["bits_per_weight"] < 16
    for row in others:
        assert row["agreement"] == 1.0, row["name"]
        # Scales of 16 or of 32 bits, and what a layout keeps beside them.
        assert row["bits_per_weight"] == pytest.approx(base["bits_per_weight"], abs=0.3), row["name"]
        assert set(comparison.layers[row["name"]].values()) == {0.0}
        assert row["num_parameters"] == base["num_parameters"]


def test_packed_agrees_on_every_answer(world: Path, tmp_path: Path) -> None:
    comparison = Comparison(world / "rows.jsonl", tmp_path, "run", teacher=None)
    comparison.add(Contestant("run", "trained", world / "run", "grace", "w4g128"))
    comparison.add(Contestant("packed", "packed", world / "packed", "grace", "w4g128"))
    result = comparison.finish("test", "pytest")
    packed = result["rows"][1]
    assert packed["agreement"] == 1.0
    assert packed["p_value"] == 1.0
    assert packed["bytes"] < result["rows"][0]["bytes"]
    assert set(comparison.layers["packed"].values()) == {0.0}


def test_packed_weights_are_the_trained_ones(world: Path) -> None:
    trained, packed = (load_model(str(world / name), "cpu").model.state_dict() for name in ("run", "packed"))
    assert trained.keys() == packed.keys()
    assert all(torch.equal(trained[name], packed[name]) for name in trained)


def test_answers_survive_the_disk(world: Path, tmp_path: Path) -> None:
    questions, engine = questions_and_engine(world / "run", world / "rows.jsonl", limit=3)
    answers = answer_all(engine, questions, max_new_tokens=2)
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_answers(tmp_path / "a.jsonl") == answers
    assert score(answers, 3).num_scored == 3


def test_a_bad_row_stops_an_evaluation(world: Path, tmp_path: Path) -> None:
    rows = (world / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:3], "{"]) + "\n")
    with pytest.raises(DataError, match="row 3 "):
        QuestionFile(tmp_path / "rows.jsonl", load_model(str(world / "run"), "cpu"), root=world)
