"""Perplexity, divergence and agreement against whole logits of the stock class."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_vlm.errors import DataError
from grace_vlm.evals.perplexity import _windows_together, read_windows, score_text
from grace_vlm.models.load import LoadedModel, load_model
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

STUDENT = Path(__file__).parents[2] / "assets" / "toy-student"
TEXT = " ".join(f"What is {n} of {n * n}? Count the red circles. The answer is blue, not {7 * n}." for n in range(99))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def opened(size: str, seed: int) -> LoadedModel:
    processor = build_toy_processor([TEXT], size=size)
    model = build_toy_model(size, processor, seed).double().eval()
    return LoadedModel(model, processor, adapter_for(model.config.model_type), size)


@pytest.mark.parametrize("size", ["tiny", "qwen2_vl", "llava"])
def test_numbers_are_those_of_whole_logits(text: Path, size: str) -> None:
    model, other = opened(size, 0), opened(size, 1)
    windows = read_windows(text, model.processor.tokenizer, 300, limit=3)
    assert len(windows) == 3
    assert {len(window) for window in windows} == {300}
    found = score_text(model, windows, other)
    losses, divergences, same = [], [], 0
    for ids in windows:
        one, two = (m.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1) for m in (model, other))
        losses.append(-one[torch.arange(299), ids[1:]].mean().item())
        divergences.append((two.exp() * (two - one)).sum(-1).mean().item())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
    assert found.losses == pytest.approx(losses, rel=1e-10)
    assert found.divergences == pytest.approx(divergences, rel=1e-8)
    assert found.agreement == same / 897
    assert found.num_tokens == 897
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 3))
    low, high = found.interval
    assert low < found.perplexity < high


def test_windows_together_are_windows_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is given several at a time; in FP64 nothing but the order of sums differs."""
    model, other = opened("llava", 0), opened("llava", 1)
    windows = read_windows(text, model.processor.tokenizer, 300, limit=3)
    assert _windows_together(torch.device("cuda"), 512) == 16
    assert _windows_together(torch.device("cuda"), 9000) == 1
    for reference in (other, None):
        alone = score_text(model, windows, reference)
        told: list[tuple[int, int]] = []
        monkeypatch.setattr("grace_vlm.evals.perplexity._windows_together", lambda device, tokens: 2)
        together = score_text(model, windows, reference, lambda *numbers, told=told: told.append(numbers))
        monkeypatch.undo()
        assert told == [(2, 3), (3, 3)]
        assert together.losses == pytest.approx(alone.losses, rel=1e-10)
        assert together.divergences == pytest.approx(alone.divergences, rel=1e-10)
        assert len(together.divergences) == (3 if reference else 0)
        assert together.agreement == alone.agreement


def test_a_model_beside_itself_has_no_divergence(text: Path) -> None:
    model = load_model(str(STUDENT), "cpu")
    windows = read_windows(text, model.processor.tokenizer, 128, limit=2)
    found = score_text(model, windows, model)
    assert found.divergence == pytest.approx(0.0, abs=1e-6)
    assert found.agreement == 1.0
    assert score_text(model, windows).agreement is None


def test_a_text_that_is_too_short_or_no_text(tmp_path: Path, text: Path) -> None:
    tokenizer = load_model(str(STUDENT), "cpu").processor.tokenizer
    with pytest.raises(DataError, match="a window 100,000; expected one window at least"):
        read_windows(text, tokenizer, 100_000)
    with pytest.raises(DataError, match=r"none\.txt cannot be read: no such file.*; expected a file in UTF-8$"):
        read_windows(tmp_path / "none.txt", tokenizer, 8)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bytes\.txt cannot be read: .*can.t decode.*; expected a file in UTF-8$"):
        read_windows(tmp_path / "bytes.txt", tokenizer, 8)


def test_the_command(grace: Callable[..., Any], text: Path) -> None:
    code, out, err = grace(
        "perplexity", STUDENT, text, "--window", "128", "--limit", "3", "--reference", STUDENT, "--json"
    )
    assert code == 0, err
    said = json.loads(out)
    assert said["num_windows"] == 3
    assert said["num_tokens"] == 381
    assert said["agreement"] == 1.0
    assert said["interval"][0] < said["perplexity"] < said["interval"][1]
    code, out, _ = grace("perplexity", STUDENT, text, "--window", "128", "--limit", "1")
    assert code == 0
    assert out.startswith("perplexity ")
    assert "[" not in out
