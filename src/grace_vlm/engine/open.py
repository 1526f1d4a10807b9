"""A model and its codes, from a path of any layout that ``formats`` reads: what the engine is given.

What stock Transformers opens, Transformers opens. The weights of other layouts (AWQ, GPTQ, GGUF, MLX, the official
ones) are laid into a model of the folder's configuration, quantized ones as bf16(q s), after which it is the same
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.lazy import Lazy
from grace_vlm.formats.registry import read_model
from grace_vlm.models.adapter import Adapter, stored_name
from grace_vlm.models.load import LoadedModel, is_original, load_model, load_processor, pick_device, resolve_source
from grace_vlm.models.registry import adapter_for
from grace_vlm.quant.affine import bake
from grace_vlm.quant.scheme import QuantizedTensor


def open_model(path: str, device: str = "auto") -> tuple[LoadedModel, Mapping[str, QuantizedTensor]]:
    """A model ready to run, and its quantized linears on their grids by module name, read when they are asked for;
    none of a hub id or the original LLaVA layout.

    Raises:
        ConfigError: no model there, or no adapter for it. FormatError: a folder that is damaged or lacks a tensor.
    """
    source = resolve_source(path)
    if not Path(source).is_dir() or is_original(path):
        return load_model(path, device), {}
    content = read_model(Path(source))
    loaded = load_model(path, device) if content.layout == "grace" else _laid_out(content, device)
    stored = {name: stored_name(loaded.adapter, name) for name, _ in loaded.model.named_modules()}
    own = {name: theirs for name, theirs in stored.items() if theirs in content.quantized}
    return loaded, Lazy(own, lambda name: content.quantized[own[name]])


def _laid_out(content: ModelContent, device: str) -> LoadedModel:
    """A model of the folder's configuration with the folder's weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    target = pick_device(device)
    stated = dict(content.config)
    adapter = adapter_for(stated.get("model_type", ""))
    config = AutoConfig.for_model(stated.pop("model_type"), **stated)
    with init_empty_weights(include_buffers=False):  # what is no weight is made, not read
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    for name, parameter in list(model.named_parameters()):
        weight = _weight(content, adapter, name).to(target, dtype)
        if weight.shape != parameter.shape:
            raise FormatError(f"{name} of {content.folder} is {tuple(weight.shape)}; expected {tuple(parameter.shape)}")
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, torch.nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    if (content.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(content.folder)
    processor = load_processor(str(content.folder))
    return LoadedModel(model.to(target).eval(), processor, adapter, str(content.folder))


def _weight(content: ModelContent, adapter: Adapter, name: str) -> torch.Tensor:
    """A parameter by its name in the model."""
    stored = stored_name(adapter, name)
    linear = stored.removesuffix(".weight")
    if linear != stored and linear in content.quantized:
        return bake(content.quantized[linear])
    if stored not in content.dense:
        raise FormatError(f"{content.folder} lacks {stored}; fetch or pack it again")
    return content.dense[stored]
