"""The other families at toy width: their own classes, processors and chat formats, random weights, any tokenizer texts.

They are for trying a family's whole path (train, pack, evaluate) without its weights: ``model.student=toy:llava``.
Everything but the size is the family's: Qwen2-VL's patches of 14 pixels, LLaVA's square crops, class token and Llama
tokenizer with byte fallback.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "initializer_range": 128**-0.5,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# Qwen2-VL's own: a system turn unless there is one, pictures where they stand.
QWEN2_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_qwen2_vl_processor(tokenizer: Any, max_pixels: int = 252 * 252) -> Any:
    """``Qwen2VLProcessor`` of Qwen2-VL around a tokenizer with Qwen's special tokens."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    pixels: dict[str, Any] = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "size": {"shortest_edge": 112 * 112, "longest_edge": max_pixels},
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=QWEN2_CHAT_TEMPLATE,
    )


def build_llama_tokenizer(texts: Iterable[str], vocab_size: int = 640) -> Any:
    """A ``LlamaTokenizer`` with byte fallback trained on ``texts``, and LLaVA's ``<image>`` and ``<pad>``."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<image>", "<pad>")])
    tokenizer.pad_token = "<pad>"
    return tokenizer


def build_llava_processor(tokenizer: Any, side: int = 112) -> Any:
    """``LlavaProcessor`` with CLIP's square crops of ``side`` pixels."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    from grace_vlm.models.llava_layout import LLAVA_CHAT_TEMPLATE

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=_CLIP_MEAN,
            image_std=_CLIP_STD,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT_TEMPLATE,
    )


def _qwen_ids(tokenizer: Any) -> dict[str, Any]:
    number = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
    }


def _qwen2_vl(tokenizer: Any, text: dict[str, Any]) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 128, "patch_size": 14}
    text = {**text, "rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]}, "tie_word_embeddings": True}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_qwen_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(tokenizer: Any, text: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision: dict[str, Any] = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    vision |= {"out_hidden_size": 128, "patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
    text = {**text, "rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]}, "tie_word_embeddings": False}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config)


def _llava(tokenizer: Any, text: dict[str, Any]) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 112, "patch_size": 14, "projection_dim": 32}
    text = {**text, "model_type": "llama", "num_key_value_heads": 2, "rope_parameters": _ROPE}
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, image_seq_length=64)
    )


_MODELS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "llava": _llava,
}
FAMILIES = tuple(_MODELS)


def build_family_processor(
    family: str, texts: Iterable[str], build_qwen_tokenizer: Callable[..., Any], side: int = 112
) -> Any:
    """The processor of a toy family, its tokenizer trained on ``texts``; ``side`` of LLaVA's square crops in pixels."""
    if family == "llava":
        return build_llava_processor(build_llama_tokenizer(texts), side)
    return build_qwen2_vl_processor(build_qwen_tokenizer(texts))


def build_family_model(family: str, processor: Any) -> Any:
    """A randomly initialised model of a toy family, from torch's current random state."""
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**_TEXT, **ids, "bos_token_id": tokenizer.bos_token_id, "vocab_size": -(-len(tokenizer) // 128) * 128}
    model = _MODELS[family](tokenizer, text)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float()
