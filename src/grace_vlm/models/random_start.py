"""Published architectures at true size with random weights: ``model.student=random:Qwen/Qwen3-VL-2B-Instruct``.

For speed, memory and trying a machine before anything is downloaded; never for quality. ``random:ID:4`` has 4 decoder
layers (and as many tower layers as DeepStack needs) at the true widths. The tokenizer is a toy's, trained on the texts
that will be seen; the head keeps its true width.
"""

from __future__ import annotations

from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.models.load import describe_config

PREFIX = "random:"


def parse_random(name: str) -> tuple[str, int | None]:
    """``random:ID`` or ``random:ID:LAYERS`` -> (id, layers)."""
    source, _, layers = name.removeprefix(PREFIX).partition(":")
    if layers and (not layers.isdigit() or int(layers) < 1):
        raise ConfigError(f"{name!r} names {layers!r} layers; expected a whole number above 0, as in random:ID:4")
    return source, int(layers) if layers else None


def random_config(name: str) -> Any:
    """The configuration behind a ``random:`` name, with fewer layers if it says so."""
    source, layers = parse_random(name)
    config = describe_config(source)
    if layers is not None:
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers = min(layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        depth = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
        setattr(vision, depth, min(max(layers, 3), getattr(vision, depth)))
        if hasattr(vision, "deepstack_visual_indexes"):
            vision.deepstack_visual_indexes = list(range(min(3, layers)))
        if hasattr(vision, "fullatt_block_indexes"):
            vision.fullatt_block_indexes = [layers - 1]
    return config


def take_ids(config: Any, tokenizer: Any) -> None:
    """Give a configuration the special ids of ``tokenizer``; ``ConfigError`` if it has more words than the head."""
    if len(tokenizer) > config.text_config.vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} words and the head {config.text_config.vocab_size}")
    number = tokenizer.convert_tokens_to_ids
    if config.model_type == "llava":
        config.image_token_index = config.image_token_id = number("<image>")
    else:
        config.image_token_id, config.video_token_id = number("<|image_pad|>"), number("<|video_pad|>")
        config.vision_start_token_id, config.vision_end_token_id = number("<|vision_start|>"), number("<|vision_end|>")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    for key, value in ids.items():
        setattr(config.text_config, key, value)


def build_random_model(config: Any, tokenizer: Any, device: torch.device, seed: int) -> Any:
    """A model of ``config`` with random weights (BF16; FP32 on a CPU), its special ids those of ``tokenizer``."""
    from transformers import AutoModelForImageTextToText

    take_ids(config, tokenizer)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(device).eval()
