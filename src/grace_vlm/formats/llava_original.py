"""A model in the names of the original LLaVA code, said in Transformers' names: what runtimes load.

The official LLaVA checkpoints are in that layout (``models/llava_layout.py`` says what it is). Reading keeps the
folder's own names and configuration, so that a folder is inspected and proved as it is, without tokenizer or tower;
a conversion to a layout that runtimes load goes through here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import ConfigError, FormatError
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.lazy import Lazy, TensorSpec, joined, spec_of
from grace_vlm.models.adapter import stored_name
from grace_vlm.models.llava_layout import (
    GROWN,
    IGNORED,
    OriginalParts,
    grow_vocabulary,
    is_original_llava,
    module_name,
    open_parts,
)
from grace_vlm.models.registry import adapter_for


def in_transformers_names(content: ModelContent, vision_tower: str | None = None) -> ModelContent:
    """``content`` as Transformers' LLaVA, if it is of the original layout; else itself.

    Args:
        vision_tower: folder or hub id, in place of the one that the configuration names.

    Raises:
        FormatError: no tokenizer, no vision tower, a name or a choice that Transformers' LLaVA does not have.
    """
    if not is_original_llava(content.config):
        return content
    try:
        return _converted(content, vision_tower)
    except ConfigError as error:
        raise FormatError(str(error)) from error


def in_the_names_of(content: ModelContent, other: ModelContent) -> ModelContent:
    """``content`` in Transformers' names if only ``other`` is in those; for comparing the two."""
    return content if is_original_llava(other.config) else in_transformers_names(content)


def _converted(content: ModelContent, vision_tower: str | None) -> ModelContent:
    adapter = adapter_for("llava")
    kept = [name for name in content.dense if not IGNORED.search(name)]
    names = [f"{name}.weight" for name in content.linears] + kept
    parts = open_parts(content.folder, dict(content.config), names, vision_tower=vision_tower)

    def renamed(name: str) -> str:
        return stored_name(adapter, module_name(name))

    modules = {renamed(name): name for name in content.linears}
    dense = {renamed(name): name for name in kept}
    text: Any = parts.config.text_config
    rows = text.vocab_size - content.config["vocab_size"]
    linears = {new: replace(content.linears[old], name=new) for new, old in modules.items()}
    return replace(
        content,
        config=_config(parts),
        linears=linears,
        quantized=Lazy(modules, lambda new: content.quantized[modules[new]]),
        baked=Lazy(modules, lambda new: content.baked[modules[new]]) if content.baked else {},
        dense=joined(_grown(content, dense, rows), _tower(parts, lambda n: stored_name(adapter, n))),
        bf16_names=tuple(renamed(name) for name in content.bf16_names),
        companions=_save(parts),
    )


def _grown(content: ModelContent, dense: dict[str, str], rows: int) -> Lazy[torch.Tensor]:
    """The folder's own tensors, embedding and head with the rows of the new words."""

    def load(new: str) -> torch.Tensor:
        tensor = content.dense[dense[new]]
        return grow_vocabulary(tensor, rows) if dense[new] in GROWN else tensor

    def spec(new: str) -> TensorSpec:
        found = spec_of(content.dense, dense[new])
        return found._replace(shape=(found.shape[0] + rows, *found.shape[1:])) if dense[new] in GROWN else found

    return Lazy(dense, load, spec)


def _tower(parts: OriginalParts, renamed: Callable[[str], str]) -> dict[str, torch.Tensor]:
    found = {renamed(f"model.vision_tower.{name}"): tensor for name, tensor in parts.tower.items()}
    return {name: tensor for name, tensor in found.items() if not IGNORED.search(name)}


def _config(parts: OriginalParts) -> dict[str, Any]:
    """``config.json`` as Transformers saves it."""
    stated: dict[str, Any] = parts.config.to_diff_dict()
    return {"architectures": ["LlavaForConditionalGeneration"], **stated, "dtype": "bfloat16"}


def _save(parts: OriginalParts) -> Callable[[Path], None]:
    return lambda stage: parts.processor.save_pretrained(stage)
