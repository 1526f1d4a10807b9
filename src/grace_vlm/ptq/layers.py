"""Calibrated quantization of a decoder, layer after layer, for any Transformers model with layers of the usual names.

Every layer sees what the quantized layers before it make. GPTQ also goes in order inside a layer: q, k, v, then o,
then gate and up, then down, each with the inputs that the ones before it now give. AWQ looks once at a layer, folds,
proves that the layer still computes what it did, and rounds it. Block reconstruction trains a layer as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.ptq.awq import clipped_scale, search_scale
from grace_vlm.ptq.block import reconstruct_layer
from grace_vlm.ptq.fold import channel_map, fold
from grace_vlm.ptq.gptq import gptq_quantize
from grace_vlm.ptq.replay import Moments, Replay
from grace_vlm.quant.affine import bake, quantize_tensor
from grace_vlm.quant.scale_init import ScaleRule, minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

CalibratedMethod = Literal["awq", "gptq", "block"]
Progress = Callable[[int, int], None]
"""Called with the layers or linears that are done and how many there are."""
FOLD_TOLERANCE = 1e-3
"""Of what a layer adds to its input: far above FP32's rounding, far below what a fold in the wrong place does."""


class Stage(NamedTuple):
    """Linears of a layer that read one input, and what makes it: a norm, or a linear's output channels."""

    linears: tuple[str, ...]
    source: str


STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Stage(("self_attn.o_proj",), "self_attn.v_proj"),
    Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Stage(("mlp.down_proj",), "mlp.up_proj"),
)


@torch.no_grad()
def quantize_layers(
    model: Any,
    schemes: Mapping[str, QuantScheme],
    replay: Replay,
    method: CalibratedMethod,
    rule: ScaleRule,
    progress: Progress = lambda done, total: None,
    unrounded: dict[str, torch.Tensor] | None = None,
) -> dict[str, QuantizedTensor]:
    """(codes, scale) on the CPU of every linear of ``schemes``; the model's weights become the baked ones, in place.

    Args:
        unrounded: filled, on the CPU, with what the method made of each weight before it was rounded: folded by awq,
            trained by block. model: in FP32 or FP64: what AWQ folds must not be rounded on its way to the grid.
        schemes: module name -> grid; every name is ``<layer>.<one of STAGES>``.
        replay: of the model's layers, on the calibration batches.

    Raises:
        ConfigError: a linear that is no part of a layer, or a layer that AWQ's fold changes.
        FormatError, NonFiniteError: NaN or Inf in a weight, or in what a linear reads.
    """
    known = {f"{layer}.{name}" for layer in replay.names for stage in STAGES for name in stage.linears}
    if unknown := sorted(set(schemes) - known):
        raise ConfigError(f"{method} knows no input of {unknown[0]}; it takes linears of decoder layers")
    one_layer = {"awq": _awq_layer, "gptq": _gptq_layer, "block": reconstruct_layer}[method]
    quantized: dict[str, QuantizedTensor] = {}
    for number, layer in enumerate(replay.names):
        own = {name.removeprefix(f"{layer}."): s for name, s in schemes.items() if name.startswith(f"{layer}.")}
        before: dict[str, torch.Tensor] = {}
        for name, tensor in one_layer(replay, number, own, rule, before).items():
            if unrounded is not None:
                unrounded[f"{layer}.{name}"] = before[name].cpu()
            quantized[f"{layer}.{name}"] = QuantizedTensor(tensor.codes.cpu(), tensor.scale.cpu(), tensor.scheme)
        replay.advance(number)
        progress(number + 1, len(replay.names))
    return {name: quantized[name] for name in schemes}


def _gptq_layer(
    replay: Replay, number: int, schemes: Mapping[str, QuantScheme], rule: ScaleRule, before: dict[str, torch.Tensor]
) -> dict[str, QuantizedTensor]:
    layer, found = replay.layers[number], {}
    for stage in STAGES:
        names = [name for name in stage.linears if name in schemes]
        if not names:
            continue
        (moments,) = replay.moments(number, [layer.get_submodule(names[0])])
        for name in names:
            weight = layer.get_submodule(name).weight
            before[name] = weight.clone()
            found[name] = gptq_quantize(weight, moments.hessian, schemes[name], rule)
            weight.copy_(bake(found[name]))
    return found


def _awq_layer(
    replay: Replay, number: int, schemes: Mapping[str, QuantScheme], rule: ScaleRule, before: dict[str, torch.Tensor]
) -> dict[str, QuantizedTensor]:
    layer = replay.layers[number]
    stages = [stage for stage in STAGES if any(name in schemes for name in stage.linears)]
    found = replay.moments(number, [layer.get_submodule(stage.linears[0]) for stage in stages])
    entered, plain = replay.run(number, 0)
    hessians: dict[str, torch.Tensor] = {}
    for stage, moments in zip(stages, found, strict=True):
        hessians.update(dict.fromkeys(stage.linears, _enlarge(layer, stage, schemes, moments)))
    after = replay.run(number, 0)[1]
    if not bool((after - plain).norm() <= FOLD_TOLERANCE * (plain - entered).norm()):
        raise ConfigError(
            f"awq changes what {replay.names[number]} ({type(layer).__name__}) computes, which has norms or heads that "
            "it does not know; use --method gptq"
        )
    result = {}
    for name, scheme in schemes.items():
        weight = layer.get_submodule(name).weight
        if rule == "minmax":
            scale = minmax_scale(weight, scheme)
        else:
            scale = clipped_scale(weight, hessians[name], scheme, rule == "mse_signed")
        before[name] = weight.clone()
        result[name] = quantize_tensor(weight, scale, scheme)
        weight.copy_(bake(result[name]))
    return result


def _is_whole(stage: Stage, schemes: Mapping[str, QuantScheme]) -> bool:
    """Whether every reader goes to a grid, and the source too if it is a linear: what stays BF16 cannot be folded."""
    return all(name in schemes for name in stage.linears) and (
        stage.source.endswith("layernorm") or stage.source in schemes
    )


def _enlarge(layer: Any, stage: Stage, schemes: Mapping[str, QuantScheme], moments: Moments) -> torch.Tensor:
    """Fold a searched scale into a stage, where that is exact; the Hessian that its linears then have."""
    readers = [layer.get_submodule(name) for name in stage.linears]
    channels = channel_map(layer, stage.source, readers[0].weight.shape[1])
    if channels is None or not _is_whole(stage, schemes):
        return moments.hessian
    channels = channels.to(moments.hessian.device)
    weights, grids = [reader.weight for reader in readers], [schemes[name] for name in stage.linears]
    scale, alpha = search_scale(weights, grids, moments, channels)
    if alpha == 0:
        return moments.hessian
    wide = fold(layer.get_submodule(stage.source), readers, scale, channels)[channels]
    return moments.hessian / wide / wide.unsqueeze(1)
