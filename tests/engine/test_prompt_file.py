"""Files of prompts and answers, and the two commands over them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds import loaded_toy, pictures

from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.prompt_file import kept_answers, read_prompts
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import DataError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    loaded = loaded_toy("tiny")
    (folder / "model").mkdir()
    loaded.model.bfloat16().save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    pictures(folder, 3)
    return folder


ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "what is this?", "image": "0.png"},
    {"prompt": ["what is this?", "a cat", "and now?"], "image": ["1.png"], "max_tokens": 3},
    {"id": "c", "prompt": "yes", "temperature": 1.0, "seed": 4, "logprobs": 1},
    {"id": "bad", "prompt": "yes", "image": "nowhere.png"},
    {"id": "e", "prompt": "no", "stop": ["a", "e"]},
]


def test_generate_and_what_was_interrupted_goes_on(world: Path, grace: Any, tmp_path: Path) -> None:
    prompts, out = world / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    args = ("generate", world / "model", "--data", prompts, "--out", out, "--max-new-tokens", 6, "--device", "cpu")
    code, _, err = grace(*args)
    assert code == 7
    missing = f"{world}/nowhere.png: no such file; image paths start from the folder {world}, --root names another"
    assert err.splitlines()[-1] == (
        f"error: 1 of 5 prompts have no answer, the first because {missing}; "
        f"{out} says why of each, --resume asks them again"
    )
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {"a", "2", "c", "bad", "e"}
    assert rows["bad"]["error"] == missing
    llm = LLM(str(world / "model"), "cpu")
    assert rows["a"]["text"] == llm.generate("what is this?", world / "0.png", SamplingParams(max_tokens=6))[0].text
    assert rows["2"]["answer_tokens"] <= 3
    assert len(rows["c"]["tokens"]) == rows["c"]["answer_tokens"]

    exists = f"error: {out} already exists; choose another path or pass --resume to go on with it\n"
    assert grace(*args)[::2] == (5, exists)
    lines = out.read_bytes().splitlines(keepends=True)
    answered = [line for line in lines if b"text" in line]
    out.write_bytes(answered[0] + b'{"id": "bad", "error": "x"}\n' + answered[1] + answered[2][:20])
    pictures(world, 1, seed=9)
    (world / "0.png").rename(world / "nowhere.png")
    pictures(world, 1)
    code, text, _ = grace(*args, "--resume", "--json")
    assert code == 0
    assert json.loads(text) == {"out": str(out), "prompts": 5, "kept": 2, "failed": 0}
    again = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert len(out.read_text().splitlines()) == 5
    # Log-probabilities may differ in their last bits: other requests ran beside.
    assert all(again[name]["text"] == rows[name]["text"] for name in ("a", "2", "c", "e"))
    (world / "nowhere.png").unlink()


def test_another_run_does_not_go_on(world: Path, grace: Any, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"id": "a", "prompt": "yes"}\n{"id": "b", "prompt": "no"}\n')
    args = ("generate", world / "model", "--data", prompts, "--out", out, "--device", "cpu", "--max-new-tokens", 3)
    assert grace(*args)[0] == 0
    before = out.read_bytes()
    note = json.loads((tmp_path / "answers.jsonl.run.json").read_text())
    assert set(note) == {
        "format_version", "weights", "kv_cache", "int8_head", "cpu_activations", "draft_tokens", "max_pixels"
    }  # fmt: skip

    def refused(*more: object) -> str:
        code, _, err = grace(*args, "--resume", *more)
        assert code == 5
        assert out.read_bytes() == before
        return str(err)

    other = "line 1, answers another prompt, picture or sampling than 'a' has now; pass another --out\n"
    assert refused("--temperature", 0.5) == f"error: {out}, {other}"
    assert refused("--cpu-activations", "fp32") == (
        f"error: {out} has answers of another run: cpu_activations was 'int8', now 'fp32'; pass another --out\n"
    )
    loaded_toy("tiny", seed=3).model.bfloat16().save_pretrained(tmp_path / "other")
    loaded_toy("tiny").processor.save_pretrained(tmp_path / "other")
    code, _, err = grace("generate", tmp_path / "other", *args[2:], "--resume")
    assert code == 5
    assert err.startswith(f"error: {out} has answers of another run: weights was '{note['weights']}', now '")
    prompts.write_text('{"id": "a", "prompt": "maybe"}\n{"id": "b", "prompt": "no"}\n')
    assert refused() == f"error: {out}, {other}"
    prompts.write_text('{"id": "a", "prompt": "yes"}\n')
    code, text, _ = grace(*args, "--resume", "--json")
    assert (code, json.loads(text)["kept"]) == (0, 1), "fewer prompts are no other run"
    (tmp_path / "answers.jsonl.run.json").unlink()
    assert refused() == (
        f"error: {out} has answers, and no readable answers.jsonl.run.json says of which model; pass another --out\n"
    )


def test_an_interrupt_says_what_is_kept(
    world: Path, grace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "yes"}) + "\n" for _ in range(5)))
    args = ("generate", world / "model", "--data", prompts, "--out", out, "--device", "cpu", "--max-new-tokens", 2)
    answers = LLM.answers

    def stopped(self: LLM, asked: Any) -> Any:
        for number, pair in enumerate(answers(self, asked)):
            if number == 2:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(LLM, "answers", stopped)
    code, _, err = grace(*args)
    assert (code, err) == (130, f"error: interrupted; 2 answers kept in {out}, continue with --resume\n")
    monkeypatch.setattr(LLM, "answers", answers)
    code, text, _ = grace(*args, "--resume", "--json")
    assert (code, json.loads(text)["kept"]) == (0, 2)


def test_generate_says_what_drafts_were_worth(world: Path, grace: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "yes no " * 9, "max_tokens": 60, "ignore_eos": True}) + "\n")
    args = ("generate", world / "model", "--data", prompts, "--device", "cpu", "--out")
    texts = []
    for name, drafts in (("a", ()), ("b", ("--draft-tokens", 4)), ("c", ("--draft-tokens", 4, "--json"))):
        code, out, err = grace(*args, tmp_path / name, *drafts)
        assert code == 0
        texts.append((out, err, (tmp_path / name).read_text()))
    assert texts[0][2] == texts[1][2] == texts[2][2]
    assert "proposed" not in texts[0][1]
    found = json.loads(texts[2][0])
    assert 0 < found["accepted"] <= found["proposed"]
    assert texts[1][1].splitlines()[-1] == f"{found['accepted']} of {found['proposed']} proposed tokens were accepted"
    assert grace(*args, tmp_path / "d", "--draft-tokens", -1)[2] == "error: draft_tokens is -1; expected at least 0\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", 'it is no object; expected one like {"prompt": "what is this?", "image": "cat.png"}'),
        (
            "what is this?",
            "it is no JSON (Expecting value: line 1 column 1 (char 0)); expected an object like "
            '{"prompt": "what is this?", "image": "cat.png"}',
        ),
        ('{"prompt": 3}', "prompt is no text; expected a text, or a list of texts"),
        ('{"prompt": "a", "image": 3}', "image is no path; expected a path, or a list of paths"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0; expected at least 1"),
        ('{"prompt": "a", "max_tokens": "x"}', "max_tokens is 'x'; expected a whole number"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens is 1.5; expected a whole number"),
        ('{"prompt": "a", "stop": [1]}', "stop is [1]; expected a text, or a list of texts"),
        ('{"id": "1", "prompt": "a"}', "id '1' is an earlier line's too; give each its own"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_prompts(path, tmp_path, SamplingParams())
    assert str(caught.value) == f"{path}, line 2: {said}"


def test_a_file_that_is_none_of_answers_stays_as_it_is(world: Path, grace: Any, tmp_path: Path) -> None:
    prompts, other = tmp_path / "prompts.jsonl", tmp_path / "notes.jsonl"
    prompts.write_text('{"prompt": "yes"}\n')
    other.write_text('{"id": 1, "note": "mine"}\n{"id": 2}\n')
    args = ("generate", world / "model", "--data", prompts, "--device", "cpu", "--resume", "--out")
    code, _, err = grace(*args, prompts)
    assert (code, err) == (2, f"error: --out and --data are one file, {prompts}; pass another --out\n")
    code, _, err = grace(*args, other)
    line = f"error: {other}, line 1, is no answer; --resume goes on with a file of answers: pass another --out\n"
    assert (code, err.splitlines(keepends=True)[-1]) == (3, line)
    assert prompts.read_text() == '{"prompt": "yes"}\n'
    assert other.read_text() == '{"id": 1, "note": "mine"}\n{"id": 2}\n'


def test_sizes_that_nothing_runs_in(world: Path, grace: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "yes"}\n')
    args = ("generate", world / "model", "--data", prompts, "--device", "cpu", "--out", tmp_path / "out.jsonl")
    assert grace(*args, "--batch-size", 0)[2] == "error: max_running is 0; expected at least 1\n"
    assert grace(*args, "--cache-tokens", -5)[2] == "error: cache_tokens is -5; expected at least 16\n"
    assert grace(*args, "--batch-size", 3000, "--max-new-tokens", 2)[0] == 0


def test_a_cache_of_a_byte_a_number(world: Path, grace: Any, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "yes"}\n')
    args = ("generate", world / "model", "--data", prompts, "--device", "cpu", "--max-new-tokens", 5, "--out", out)
    assert grace(*args, "--kv-cache", "int4")[2] == "error: kv_cache is 'int4'; expected model or fp8\n"
    assert grace(*args, "--kv-cache", "fp8")[0] == 0
    llm = LLM(str(world / "model"), "cpu", EngineOptions(kv_cache="fp8"))
    expected = llm.generate("yes", sampling=SamplingParams(max_tokens=5))[0].text
    assert json.loads(out.read_text())["text"] == expected
    args = ("chat", world / "model", "--question", "yes", "--device", "cpu", "--max-new-tokens", 5, "--kv-cache")
    assert grace(*args, "fp8")[1] == expected + "\n"
    assert grace(*args, "16")[2] == "error: kv_cache is '16'; expected model or fp8\n"


def test_a_vocabulary_in_eight_bits(world: Path, grace: Any, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "yes", "logprobs": 0}\n')
    args = (world / "model", "--device", "cpu", "--max-new-tokens", 5, "--int8-head")
    assert grace("generate", *args, "--data", prompts, "--out", out)[0] == 0
    params = SamplingParams(max_tokens=5, logprobs=0)
    int8, plain = (
        LLM(str(world / "model"), "cpu", options).generate("yes", sampling=params)[0]
        for options in (EngineOptions(int8_head=True), EngineOptions())
    )
    logprob = json.loads(out.read_text())["tokens"][0][1]
    assert logprob == pytest.approx(int8.choices[0].logprob, abs=1e-6)
    assert logprob != pytest.approx(plain.choices[0].logprob, abs=1e-6)
    assert grace("chat", *args, "--question", "yes")[1] == int8.text + "\n"


def test_texts_that_json_allows(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(path, tmp_path, SamplingParams())[0].prompt == ["a\u2028b\x85c"]
    path.write_text('{"prompt": "yes", "stop": "END"}\n')
    assert read_prompts(path, tmp_path, SamplingParams())[0].sampling.stop == ("END",)


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "max_token": 3}\n')
    with pytest.raises(DataError, match="line 1: unknown key 'max_token'; expected some of frequency_penalty, id, "):
        read_prompts(path, tmp_path, SamplingParams())
    with pytest.raises(DataError, match=r"none cannot be read: no such file or directory; expected a file in UTF-8$"):
        read_prompts(tmp_path / "none", tmp_path, SamplingParams())
    assert kept_answers(tmp_path / "none", [], {}) == set()


def test_a_talk_in_turns(world: Path, grace: Any) -> None:
    talk = f"what is this?\n/image {world / '0.png'}\nand this?\nyes?\n/new\nwhat is this?\n/quit\nnever asked\n"
    args = ("chat", world / "model", "--max-new-tokens", 5, "--device", "cpu")
    code, out, _ = grace(*args, stdin=talk)
    assert code == 0
    llm, params = LLM(str(world / "model"), "cpu"), SamplingParams(max_tokens=5)
    first = llm.generate("what is this?", sampling=params)[0].text
    turns = ["what is this?", first, "<image>\nand this?"]
    second = llm.generate([turns], [world / "0.png"], params)[0].text
    turns += [second, "yes?"]
    third = llm.generate([turns], [world / "0.png"], params)[0].text
    assert out == "".join(f"{text}\n" for text in (first, second, third, first))


def test_what_cannot_be_said_in_a_talk(world: Path, grace: Any) -> None:
    args = ("chat", world / "model", "--max-new-tokens", 2, "--device", "cpu")
    code, _, err = grace(*args, stdin="/image nowhere.png\nwhat?\n")
    assert (code, err) == (7, "error: nowhere.png: no such file\n")
    code, _, err = grace(*args, stdin="/dance\n")
    assert (code, err) == (0, "/dance is no command; there are /image PATH, /new and /quit\n")
    assert grace(*args, "--json")[2] == "error: --json is for one answer; pass --question TEXT too\n"
    assert grace(*args, "--question", " ")[2] == "error: the question is empty; pass --question TEXT\n"


def test_what_could_not_begin_leaves_nothing(
    grace: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schema without its package is said at the first request; the corrected command is then not in its own way."""
    prompts, out, schema = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", tmp_path / "schema.json"
    prompts.write_text(json.dumps({"id": "a", "prompt": "what is it?"}) + "\n")
    schema.write_text('{"type": "string"}')
    args = ("generate", world / "model", "--data", prompts, "--out", out, "--device", "cpu", "--max-new-tokens", 2)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    code, _, err = grace(*args, "--json-schema", schema)
    assert (code, err.strip()) == (2, "error: json_schema needs llguidance; pip install llguidance")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "schema.json"]
    asked = prompts.read_text()
    prompts.write_text(json.dumps({"id": "a", "prompt": "what is it?", "json_schema": {"type": "string"}}) + "\n")
    code, _, err = grace(*args)
    assert (code, err.strip()) == (2, "error: json_schema needs llguidance; pip install llguidance")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "schema.json"]
    prompts.write_text(asked)
    monkeypatch.undo()
    schema.write_text('{"type": "colour"}')
    code, _, err = grace(*args, "--json-schema", schema)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {schema}: json_schema cannot be followed: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "schema.json"]
    assert grace(*args)[0] == 0
    assert len(out.read_text().splitlines()) == 1
