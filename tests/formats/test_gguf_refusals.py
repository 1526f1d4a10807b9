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
    (
        lambda c: c["text_config"].update(num_hidden_layers="2"),
        "reads: Validation error for field 'num_hidden_layers': TypeError: .* expected int, got str",
    ),
    (
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[12.5, 10, 9.5]),
        r"has mrope_section = \[12\.5, 10, 9\.5\]; gguf needs a list of 3 whole numbers",
    ),
    (
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[1, 2, 3]),
        r"has mrope_section = \[1, 2, 3\]; gguf needs a sum of 32, half a head",
    ),
    (
        lambda c: c["text_config"]["rope_parameters"].update(rope_theta=10**400),
        r"has rope_theta = 10{76}\.\.\.; gguf needs a number above 0 that FP32 holds",
    ),
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


def text(**stated: Any) -> Change:
    return lambda c: c["text_config"].update(stated)


def vision(**stated: Any) -> Change:
    return lambda c: c["vision_config"].update(stated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (text(num_hidden_layers=4000), "has num_hidden_layers = 4000, the weights have the layers [0, 1]"),
        (text(num_hidden_layers=1), "has num_hidden_layers = 1, the weights have the layers [0, 1]"),
        (text(vocab_size=512), "says vocab_size = 512, token_embd.weight has shape [384, 128]"),
        (text(hidden_size=256), "says hidden_size = 256, token_embd.weight has shape [384, 128]"),
        (text(intermediate_size=512), "says intermediate_size = 512, blk.0.ffn_gate.weight has shape [128, 128]"),
        (
            text(num_attention_heads=4),
            "says num_attention_heads x head_dim = 256, blk.0.attn_q.weight has shape [128, 128]",
        ),
        (
            text(num_key_value_heads=2),
            "says num_key_value_heads x head_dim = 128, blk.0.attn_k.weight has shape [64, 128]",
        ),
        (vision(depth=3), "has vision_config.depth = 3, the weights have the layers [0, 1]"),
        (vision(patch_size=8), "says vision_config.patch_size = 8, v.patch_embd.weight has shape [32, 3, 16, 16]"),
        (vision(spatial_merge_size=4), "says the projector's input = 512, mm.0.weight has shape [128, 128]"),
        (vision(deepstack_visual_indexes=[0, 1]), "has 2 deepstack_visual_indexes, the weights 1 mergers"),
        (
            vision(num_position_embeddings=16),
            "says the number of places for the tower's image size = 16, v.position_embd.weight has shape [256, 32]",
        ),
    ],
)
def test_a_configuration_of_another_model(models: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_json(folder / "config.json", change)
    with pytest.raises(FormatError) as caught:
        pack(folder, tmp_path / "out", "gguf")
    assert str(caught.value) == f"config.json {message}; put the config.json of these weights beside them"
    assert not (tmp_path / "out").exists()


def test_a_tower_of_another_width(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_json(folder / "config.json", vision(hidden_size=64))
    with pytest.raises(FormatError, match=r"config\.json says vision_config\.hidden_size = 64, v\..* has shape \[32"):
        pack(folder, tmp_path / "out", "gguf")


def test_errors_name_the_source_and_not_the_stage(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_json(folder / "tokenizer.json", lambda t: t["model"].update(merges={"a b": 1}))
    with pytest.raises(FormatError) as caught:
        pack(folder, tmp_path / "out", "gguf")
    assert str(caught.value) == (
        f"{folder / 'tokenizer.json'} is no BPE tokenizer (merges is a dict, no list); gguf is written for Qwen's and "
        "Llama's"
    )


def test_a_mean_beyond_all_numbers(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [1e999, 0.5, 0.5], "image_std": [1, 1, 1]}')
    with pytest.raises(FormatError) as caught:
        pack(folder, tmp_path / "out", "gguf")
    path = folder / "preprocessor_config.json"
    assert str(caught.value) == f"{path} is no usable JSON: '1e999' is too large a number"


@pytest.mark.parametrize("mean", [None, [0.5], ["0.5"] * 3, 0.5, [1e300] * 3, [10**400] * 3, [True] * 3])
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
    lambda t: t["model"].update(merges=[["a", "b", "c"]]),
    lambda t: t["model"].update(merges=["a"]),
    lambda t: t["model"].update(merges={"a b": 1}),
    lambda t: t["model"].update(merges="a b"),
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


def test_bytes_before_merges_are_gpt2_s_whatever_the_model_says_of_fallback(models: Path, tmp_path: Path) -> None:
    """Transformers 5.17 reads SmolLM2 so. As words of Llama's kind llama.cpp opened them, and answered nothing."""
    folder = copy_of(models / "w4", tmp_path / "copy")
    expected = tokenizer_values(folder, 384)
    assert expected["tokenizer.ggml.model"] == "gpt2"
    edit_json(folder / "tokenizer.json", lambda t: t["model"].update(byte_fallback=True, unk_token="<|endoftext|>"))
    assert tokenizer_values(folder, 384) == expected


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


@pytest.mark.parametrize("model_type", [["qwen3_vl"], {}, None, "bert"])
def test_a_family_that_is_no_name(models: Path, tmp_path: Path, model_type: Any) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_json(folder / "config.json", lambda c: c.update(model_type=model_type))
    with pytest.raises(FormatError, match="gguf is written for qwen3_vl, qwen2_vl, qwen2_5_vl, llava; this model is"):
        pack(folder, tmp_path / "out", "gguf")
