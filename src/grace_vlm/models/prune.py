"""A model with some of its decoder layers: ``model.student=pruned:runs/teacher:15`` or ``pruned:runs/teacher:0-9,25``.

A smaller student of any family's own class, with the teacher's tower, vocabulary and widths. What is left must be
trained to heal. A number alone keeps so many layers at even distances, the first and the last among them (as DistilBERT
was started); which ones a family misses least is an experiment, so they can be said.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from grace_vlm.errors import ConfigError

PREFIX = "pruned:"


def parse_pruned(name: str) -> tuple[str, str]:
    """``pruned:MODEL:LAYERS`` -> (model, layers)."""
    source, _, layers = name.removeprefix(PREFIX).rpartition(":")
    if not source or re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", layers) is None:
        raise ConfigError(
            f"{name!r} is no pruned model; expected {PREFIX}MODEL:N for N layers at even distances, or the layers "
            f"themselves, as in {PREFIX}MODEL:0-9,25-29"
        )
    return source, layers


def kept_layers(name: str, num_layers: int) -> tuple[int, ...]:
    """The layers, in order, that ``pruned:...`` keeps of ``num_layers``; ``ConfigError`` if they are not there."""
    _, stated = parse_pruned(name)
    if stated.isdigit():
        count = int(stated)
        if not 1 <= count <= num_layers:
            raise ConfigError(f"{name!r} asks for {count} layers of {num_layers}; expected 1 to {num_layers}")
        last = num_layers - 1
        return tuple(round(i * last / max(count - 1, 1)) for i in range(count))
    kept: list[int] = []
    for part in stated.split(","):
        first, _, last_stated = part.partition("-")
        kept += range(int(first), int(last_stated or first) + 1)
    if kept != sorted(set(kept)) or not kept or kept[-1] >= num_layers:
        raise ConfigError(f"{name!r} keeps layers {stated}; expected rising numbers from 0 to {num_layers - 1}")
    return tuple(kept)


def pruned_config(config: Any, kept: tuple[int, ...]) -> Any:
    """A copy of a model's configuration with the layers ``kept`` of its decoder."""
    config = copy.deepcopy(config)
    text = config.text_config
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[number] for number in kept]
    text.num_hidden_layers = len(kept)
    return config


def prune(model: Any, kept: tuple[int, ...]) -> None:
    """Leave only the layers ``kept`` of a model's decoder, in place."""
    language = model.model.language_model
    language.layers = nn.ModuleList(language.layers[number] for number in kept)
    for number, layer in enumerate(language.layers):
        layer.self_attn.layer_idx = number
    config = pruned_config(model.config, kept)
    model.config.text_config.__dict__.update(config.text_config.__dict__)
    language.config = model.config.text_config
