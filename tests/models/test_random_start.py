"""True sizes with random weights, cut in depth: what the benchmarks and a machine's first try use."""

from __future__ import annotations

import pytest

from grace_vlm.errors import ConfigError
from grace_vlm.models.known import KNOWN
from grace_vlm.models.load import meta_model
from grace_vlm.models.random_start import parse_random, random_config


def test_names() -> None:
    assert parse_random("random:Qwen/Qwen3-VL-2B-Instruct") == ("Qwen/Qwen3-VL-2B-Instruct", None)
    assert parse_random("random:Qwen/Qwen3-VL-2B-Instruct:4") == ("Qwen/Qwen3-VL-2B-Instruct", 4)
    with pytest.raises(ConfigError) as caught:
        parse_random("random:Qwen/Qwen3-VL-2B-Instruct:none")
    assert str(caught.value) == (
        "'random:Qwen/Qwen3-VL-2B-Instruct:none' names 'none' layers; expected a whole number above 0, "
        "as in random:ID:4"
    )


@pytest.mark.parametrize("name", sorted({repr(sorted(c.items())): n for n, c in KNOWN.items()}.values()))
@pytest.mark.parametrize("layers", [1, 3])
def test_depth_is_cut_and_widths_stay(name: str, layers: int) -> None:
    whole, cut = random_config(f"random:{name}"), random_config(f"random:{name}:{layers}")
    assert cut.text_config.num_hidden_layers == layers
    for key in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"):
        assert getattr(cut.text_config, key) == getattr(whole.text_config, key)
    model, adapter = meta_model(cut)
    assert len(model.model.language_model.layers) == layers
    assert adapter.model_type == cut.model_type
