"""The published models without weights: their sizes, their linears, their scales."""

from __future__ import annotations

import pytest

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.known import KNOWN
from grace_vlm.models.load import describe_config, describe_model

# (linears of the language model, group scales at 128, all parameters); shapes summed by hand below.
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": (196, 11_010_048, 2_127_532_032),
    "Qwen/Qwen3-VL-4B-Instruct": (252, 28_385_280, 4_437_815_808),
    "Qwen/Qwen3-VL-8B-Instruct": (252, 54_263_808, 8_767_123_696),
    "Qwen/Qwen3-VL-32B-Instruct": (448, 243_793_920, 33_357_390_064),
    "Qwen/Qwen2-VL-2B-Instruct": (196, 10_235_904, 2_208_985_600),
    "Qwen/Qwen2-VL-7B-Instruct": (196, 50_978_816, 8_291_375_616),
    "Qwen/Qwen2.5-VL-3B-Instruct": (252, 21_676_032, 3_754_622_976),
    "Qwen/Qwen2.5-VL-7B-Instruct": (196, 50_978_816, 8_292_166_656),
    "llava-hf/llava-1.5-7b-hf": (224, 50_593_792, 7_063_427_072),
    "llava-hf/llava-1.5-13b-hf": (280, 99_123_200, 13_351_494_656),
}


def decoder_weights(hidden: int, intermediate: int, layers: int, attention: int, key_value: int) -> int:
    """Weights of q, k, v, o, gate, up, down over all layers."""
    return layers * (2 * hidden * attention + 2 * hidden * key_value + 3 * hidden * intermediate)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_on_the_meta_device(name: str) -> None:
    linears, scales, parameters = PUBLISHED[name]
    model, adapter = describe_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    plan = plan_model(model, adapter, "w4g128")
    assert len(plan.schemes) == linears
    assert sum(entry.num_scales for entry in plan.entries) == scales
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    weights = decoder_weights(
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        text.num_attention_heads * head_dim,
        text.num_key_value_heads * head_dim,
    )
    assert scales == weights // 128
    assert linears == 7 * text.num_hidden_layers
    tied = [entry for entry in plan.entries if entry.tied_to]
    assert bool(tied) == bool(model.config.tie_word_embeddings)
    stored = sum(entry.stored_bytes for entry in plan.entries if entry.scheme)
    assert stored == weights * (4 + 16 / 128) / 8


def test_every_known_name_is_covered() -> None:
    configs = [repr(sorted(KNOWN[name].items(), key=str)) for name in PUBLISHED]
    assert all(repr(sorted(config.items(), key=str)) in configs for config in KNOWN.values())
    assert len(set(configs)) == len(PUBLISHED)


def test_one_description_does_not_change_the_next() -> None:
    describe_config("Qwen/Qwen3-VL-2B-Instruct").text_config.num_hidden_layers = 1
    assert describe_config("Qwen/Qwen3-VL-2B-Instruct").text_config.num_hidden_layers == 28


def test_a_group_that_does_not_divide_names_what_fits() -> None:
    model, adapter = describe_model("Qwen/Qwen3-VL-8B-Instruct")
    with pytest.raises(ConfigError) as caught:
        plan_model(model, adapter, "w4g128", {"tower": "w8g128"})
    assert str(caught.value) == (
        "group size 128 does not divide in_features 4304 of model.visual.blocks.0.mlp.linear_fc2; use w8g16"
    )
    mixed = plan_model(model, adapter, "w4g128", {"tower": "w8g16", "projector": "w8g128", "head": "w8g128"})
    assert {e.part: e.scheme.name for e in mixed.entries if e.scheme} == {
        "tower": "w8g16",
        "projector": "w8g128",
        "language": "w4g128",
        "head": "w8g128",
    }


def test_a_tied_head_gets_its_grid_through_the_embedding() -> None:
    model, adapter = describe_model("Qwen/Qwen3-VL-2B-Instruct")
    for plan in (
        plan_model(model, adapter, "w4g128", {"head": "w8g128"}),
        plan_model(model, adapter, "w4g128", overrides=[("lm_head", "w8g128")]),
    ):
        by_name = {entry.name: entry for entry in plan.entries}
        assert by_name["lm_head"].scheme is None
        assert by_name["lm_head"].why_bf16 == "is the matrix of model.language_model.embed_tokens"
        embedding = by_name["model.language_model.embed_tokens"]
        assert embedding.scheme is not None
        assert embedding.num_scales == 151936 * 2048 // 128
        assert "lm_head" not in plan.bf16_names
