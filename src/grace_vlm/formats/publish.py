"""Write a model folder: what stock loaders open, with the grid beside it.

config.json model*.safetensors processor and tokenizer files README.md     BF16, stock names
grid/codes-*.safetensors grid/plan.json                                    (q, s), if there is a grid
start/codes-*.safetensors start/plan.json                                  the same of weights that are not rounded yet
manifest.json manifest.sha256                                              published whole or not at all
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.checkpoint.atomic import publish_folder
from grace_vlm.formats.folder import GRID, START, write_grid
from grace_vlm.formats.shards import write_weights
from grace_vlm.models.adapter import stored_name
from grace_vlm.models.registry import adapter_for
from grace_vlm.quant.affine import bake
from grace_vlm.quant.scheme import QuantizedTensor


def _bf16_state(
    model: Any, quantized: Mapping[str, QuantizedTensor], elsewhere: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers in BF16 under stock names; a tied head has no tensor of its own."""
    # What has a grid is of its integers, so that the file is bf16(q * s) whatever the leaf went through.
    on_grid = {f"{name}.weight": tensor for name, tensor in quantized.items()}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in on_grid:
            state[name] = bake(on_grid[name]).cpu()
        else:
            state[name] = elsewhere.get(name, parameter.detach()).to(torch.bfloat16).cpu()
    tied = {name for name in model.state_dict() if name.endswith("lm_head.weight")} - state.keys()
    for name, buffer in model.state_dict().items():
        if name not in state and name not in tied:
            state[name] = buffer.detach().cpu()
    state |= {name: bake(tensor).cpu() for name, tensor in on_grid.items() if name not in state}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def publish_model(
    dst: Path,
    model: Any,
    processor: Any,
    quantized: Mapping[str, QuantizedTensor],
    bf16_names: tuple[str, ...],
    card: str,
    *,
    overwrite: bool = False,
    elsewhere: Mapping[str, torch.Tensor] | None = None,
    start: Mapping[str, QuantizedTensor] | None = None,
) -> Path:
    """Write and publish a model folder.

    Args:
        model: a Transformers model whose weights are BF16 values (any dtype).
        quantized: (codes, scale) by module name; empty for a BF16 model. Files have the names that Transformers
            stores, which for some architectures are others (``Adapter.stored_names``).
        bf16_names: the linears that have no grid, for ``plan.json``.
        card: text of README.md.
        elsewhere: parameters by name that the model itself does not hold now, whole.
        start: where training may begin with weights that are not on the grid yet, in ``start/``, laid out as ``grid/``.

    Raises:
        CheckpointError: ``dst`` exists without ``overwrite``, or the disk refuses.
    """
    state, adapter = _bf16_state(model, quantized, elsewhere or {}), adapter_for(model.config.model_type)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    grids = {GRID: quantized, START: start or {}}
    codes_bytes = sum(
        tensor.codes.numel() + 2 * tensor.scale.numel() for own in grids.values() for tensor in own.values()
    )
    with publish_folder(dst, overwrite=overwrite, needed_bytes=num_bytes + codes_bytes) as stage:
        for config in (
            model.config,
            getattr(model.config, "text_config", None),
            getattr(model.config, "vision_config", None),
        ):
            if config is not None:
                config.dtype = torch.bfloat16
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(stage)
        if model.can_generate():
            model.generation_config.save_pretrained(stage)
        # Not by save_pretrained: its names of LLaVA's tower are the newest, which vLLM does not know yet.
        write_weights(stage, {stored_name(adapter, name): tensor for name, tensor in state.items()})
        processor.save_pretrained(stage)
        for place, own in grids.items():
            if own:
                stored = {stored_name(adapter, name): tensor for name, tensor in own.items()}
                write_grid(stage, stored, tuple(stored_name(adapter, name) for name in bf16_names), place)
        (stage / "README.md").write_text(card, encoding="utf-8")
    return dst
