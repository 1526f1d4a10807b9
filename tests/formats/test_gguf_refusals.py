"""What GGUF cannot be made of: configurations and tokenizers that are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import copy_of, edit_json

from grace_vlm.errors import FormatError
from grace_vlm.formats.gguf import apart, interleaved
from grace_vlm.formats.gguf_file import write_gguf
from grace_vlm.formats.gguf_names import QWEN3
from grace_vlm.formats.gguf_tokenizer import tokenizer_values
from grace_vlm.formats.gguf_values import parsed_config, text_values, vision_values
from grace_vlm.formats.pack import pack

Change = Callable[[Any], Any]
CONFIG_CASES: list[tuple[Change, str]] = [
    (
        lambda c: c["text_config"]["rope_parameters"].pop("mrope_section"),
        "has mrope_section = None; gguf needs a list of 3",
    ),
    (
        lambda c: c["text_config"].update(vocab_size=1 << 40),
        "has vocab_size = 1099511627776; gguf needs a whole number",
    ),
    (lambda c: c["text_config"].update(num_key_value_heads=-1), "has num_key_value_heads = -1"),
    (lambda c: c["text_config"].update(num_attention_heads=0), "has num_attention_heads = 0|is not one that"),
    (lambda c: c["vision_config"].update(depth=1 << 40), "has depth = 1099511627776"),
    (lambda c: c["vision_config"].update(num_position_embeddings=-4), "has num_position_embeddings = -4"),
    (lambda c: c["text_config"].update(hidden_size="128"), "config.json is not one that Transformers reads"),
    (lambda c: c.pop("model_type"), "config.json is not one that Transformers reads: 'model_type'"),
]


def values_of(stated: dict[str, Any], folder: Path) -> None:
    config = parsed_config(stated)
    text_values(config, QWEN3, [])
    vision_values(config, QWEN3, "qwen3vl_merger", folder)


@pytest.mark.parametrize(("change", "message"), CONFIG_CASES)
def test_a_configuration_that_no_model_has(models: Path, change: Change, message: str) -> None:
    stated = json.loads((models / "w4" / "config.json").read_text())
    change(stated)
    with pytest.raises(FormatError, match=message):
        values_of(stated, models / "w4")


@pytest.mark.parametrize("mean", [None, [0.5], ["0.5"] * 3, 0.5])
def test_a_mean_that_is_no_colour(models: Path, tmp_path: Path, mean: Any) -> None:
    config = parsed_config(json.loads((models / "w4" / "config.json").read_text()))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": [1.0] * 3}))
    with pytest.raises(FormatError, match=r"the image processor has image_mean = .*; gguf needs a list of 3 numbers"):
        vision_values(config, QWEN3, "qwen3vl_merger", tmp_path)


TOKENIZER_CASES: list[Change] = [
    lambda t: t["model"]["vocab"].update(x="7"),
    lambda t: t["added_tokens"][0].update(content=7),
    lambda t: t["added_tokens"][0].update(content=["x"]),
    lambda t: t["model"].update(merges=[[1, 2]]),
    lambda t: t.pop("model"),
    lambda t: t.update(model=[]),
]


@pytest.mark.parametrize("change", TOKENIZER_CASES)
def test_a_tokenizer_that_is_none(models: Path, tmp_path: Path, change: Change) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_json(folder / "tokenizer.json", change)
    with pytest.raises(
        FormatError, match=r"tokenizer\.json is no BPE tokenizer \(.*; gguf is written for Qwen's and Llama's"
    ):
        tokenizer_values(folder, 384)


def test_odd_settings_of_a_tokenizer_say_nothing(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_json(folder / "tokenizer.json", lambda t: t.update(post_processor={"processors": [{"single": {"a": 1}}]}))
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(eos_token=["x"], add_bos_token=None))
    values = tokenizer_values(folder, 384)
    assert "tokenizer.ggml.eos_token_id" not in values
    assert values["tokenizer.ggml.add_bos_token"] is False
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja is not UTF-8"):
        tokenizer_values(folder, 384)


@pytest.mark.parametrize("value", [-1, 1 << 32, 1e300, [1 << 31]])
def test_a_number_that_no_header_holds(tmp_path: Path, value: Any) -> None:
    with pytest.raises(FormatError, match="gguf cannot hold a = "):
        write_gguf(tmp_path / "x.gguf", {"a": value}, {}, lambda name: torch.zeros(1))


def test_rows_that_are_no_whole_heads() -> None:
    for function in (interleaved, apart):
        with pytest.raises(FormatError, match="has 6 rows; 2 heads need a multiple of twice that"):
            function(torch.zeros(6, 2), 2)


@pytest.mark.parametrize("model_type", [["qwen3_vl"], {}, None, "bert"])
def test_a_family_that_is_no_name(models: Path, tmp_path: Path, model_type: Any) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_json(folder / "config.json", lambda c: c.update(model_type=model_type))
    with pytest.raises(FormatError, match="gguf is written for qwen3_vl, qwen2_vl, qwen2_5_vl, llava; this model is"):
        pack(folder, tmp_path / "out", "gguf")
