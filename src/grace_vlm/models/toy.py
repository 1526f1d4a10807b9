"""Small real models: Qwen3-VL's own classes and processor at a size that two CPU cores can train.

Nothing is a toy but the size. The tokenizer is a byte-level BPE trained on the texts it will see, with Qwen's special
tokens and chat format; the image processor is Qwen's, with a least area of 128 x 128 pixels (its ``shortest_edge`` is
an area), so that a picture has at least 16 visual tokens. Widths are multiples of 128: every group size works.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.models.toy_families import FAMILIES, build_family_model, build_family_processor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- 'IMAGE' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def chat_template(image: str) -> str:
    """ChatML without a system turn of its own accord; ``image``: what stands for a picture, escaped as in Jinja."""
    return _CHATML.replace("IMAGE", image)


CHAT_TEMPLATE = chat_template("<|vision_start|><|image_pad|><|vision_end|>")


@dataclass(frozen=True)
class ToySize:
    """Widths and depths of a toy model; ``deepstack`` names the tower layers that feed the decoder directly."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    deepstack: tuple[int, ...]


TOY_SIZES = {
    "student": ToySize(128, 384, 4, 2, 1, 128, 512, 4, 4, (1,)),
    "teacher": ToySize(384, 1024, 5, 6, 2, 128, 512, 4, 4, (1,)),
    "tiny": ToySize(128, 128, 2, 2, 1, 32, 64, 2, 2, (0,)),
}


def build_qwen_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Any:
    """A ``Qwen2Tokenizer`` trained on ``texts``, with Qwen's special tokens; the same texts give the same one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],  # type: ignore[misc]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def build_toy_processor(
    texts: Iterable[str], vocab_size: int = 1024, max_pixels: int = 256 * 256, size: str = "tiny", side: int = 112
) -> Any:
    """A real processor whose tokenizer is trained on ``texts``: Qwen3-VL's, or that of the family ``size`` names.

    ``side``: of LLaVA's square crops in pixels.
    """
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    if size in FAMILIES:
        return build_family_processor(size, texts, build_qwen_tokenizer, side)
    pixels: dict[str, Any] = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 128 * 128, "longest_edge": max_pixels},
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=build_qwen_tokenizer(texts, vocab_size),
        video_processor=Qwen3VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_toy_model(size: str, processor: Any, seed: int = 0) -> Any:
    """A randomly initialised FP32 model: Qwen3-VL with a tied head of ``TOY_SIZES``, or one of ``FAMILIES``."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    if size in FAMILIES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_family_model(size, processor)
    if size not in TOY_SIZES:
        raise ConfigError(f"unknown toy size {size!r}; expected one of {', '.join([*TOY_SIZES, *FAMILIES])}")
    s = TOY_SIZES[size]
    token_id = processor.tokenizer.convert_tokens_to_ids
    head_dim = s.hidden // s.heads
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(processor.tokenizer) // 128) * 128,
            "hidden_size": s.hidden,
            "intermediate_size": s.intermediate,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6],
                "mrope_interleaved": True,
            },
            "pad_token_id": token_id("<|endoftext|>"),
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            # 0.02 fits widths of thousands; at 128 it leaves every layer a whisper beside its residual (docs/log.md).
            "initializer_range": s.hidden**-0.5,
        },
        vision_config={
            "depth": s.vision_layers,
            "hidden_size": s.vision_hidden,
            "intermediate_size": s.vision_intermediate,
            "num_heads": s.vision_heads,
            "patch_size": 16,
            "out_hidden_size": s.hidden,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": list(s.deepstack),
            "initializer_range": s.vision_hidden**-0.5,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token_id("<|im_end|>")
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    return model.float()
