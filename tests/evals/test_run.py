"""Evaluation: the same answers in every batch size, and from the packed folder as from the trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import DataError
from grace_vlm.evals.compare import Comparison, Contestant
from grace_vlm.evals.run import QuestionFile, answer_all, read_answers, score, write_answers
from grace_vlm.formats.pack import pack
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


def test_answers_do_not_depend_on_the_batch(world: Path) -> None:
    loaded = load_model(str(world / "run"), "cpu")
    questions = QuestionFile(world / "rows.jsonl", loaded)
    alone = answer_all(loaded, questions, batch_size=1, max_new_tokens=6)
    together = answer_all(loaded, questions, batch_size=7, max_new_tokens=6, vision_bytes=0)
    assert alone == together
    assert [answer.row for answer in alone] == list(range(24))
    assert alone[0].question == "what color is the square?"


def test_greedy_equals_transformers_generate(world: Path) -> None:
    from PIL import Image

    loaded = load_model(str(world / "run"), "cpu")
    questions = QuestionFile(world / "rows.jsonl", loaded, limit=4)
    ours = [answer.answer for answer in answer_all(loaded, questions, batch_size=4, max_new_tokens=5)]
    for number, answer in enumerate(ours):
        content = [{"type": "image"}, {"type": "text", "text": "what color is the square?"}]
        text = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = Image.open(world / "images" / f"{number}.png")
        inputs = loaded.processor(text=[text], images=[image], return_tensors="pt")
        out = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert loaded.processor.tokenizer.decode(new, skip_special_tokens=True) == answer


def test_a_model_may_have_several_closing_tokens(world: Path) -> None:
    """Qwen3-VL's generation config lists two; one id and a list of ids stop alike."""
    loaded = load_model(str(world / "run"), "cpu")
    questions = QuestionFile(world / "rows.jsonl", loaded, limit=3)
    one = answer_all(loaded, questions, max_new_tokens=5)
    tokenizer = loaded.processor.tokenizer
    loaded.model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert answer_all(loaded, questions, max_new_tokens=5) == one


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
    loaded = load_model(str(world / "run"), "cpu")
    answers = answer_all(loaded, QuestionFile(world / "rows.jsonl", loaded, limit=3), max_new_tokens=2)
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_answers(tmp_path / "a.jsonl") == answers
    assert score(answers, 3).num_scored == 3


def test_a_bad_row_stops_an_evaluation(world: Path, tmp_path: Path) -> None:
    rows = (world / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:3], "{"]) + "\n")
    with pytest.raises(DataError, match="row 3 "):
        QuestionFile(tmp_path / "rows.jsonl", load_model(str(world / "run"), "cpu"), root=world)
