"""Calibrated quantization of a decoder, layer after layer, for any Transformers model with layers of the usual names.

Every layer sees what the quantized layers before it make. GPTQ also goes in order inside a layer: q, k, v, then o,
then gate and up, then down, each with the inputs that the ones before it now give. AWQ looks once at a layer, folds,
and rounds its linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.ptq.awq import awq_scale, search_scale, shrink_norm
from grace_vlm.ptq.gptq import gptq_quantize
from grace_vlm.ptq.replay import Forward, Moments, Replay
from grace_vlm.quant.affine import bake, quantize_tensor
from grace_vlm.quant.scale_init import ScaleRule
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme


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

Progress = Callable[[int, int], None]


@torch.no_grad()
def quantize_layers(
    model: Any,
    schemes: Mapping[str, QuantScheme],
    layers: Sequence[str],
    forwards: Sequence[Forward],
    method: Literal["awq", "gptq"],
    rule: ScaleRule,
    progress: Progress = lambda done, total: None,
) -> dict[str, QuantizedTensor]:
    """(codes, scale) of every linear of ``schemes``; the model's weights become the baked ones, in place.

    Args:
        schemes: module name -> grid; every name is ``<layer>.<one of STAGES>``.
        layers: module names of the decoder's layers, in order.
        forwards: each runs the model on one batch without padding.

    Raises:
        ConfigError: a linear that is no part of a layer. DataError: no batch. NonFiniteError: NaN or Inf on the way.
    """
    known = {f"{layer}.{name}" for layer in layers for stage in STAGES for name in stage.linears}
    if unknown := sorted(set(schemes) - known):
        raise ConfigError(f"{method} knows no input of {unknown[0]}; it takes linears of decoder layers")
    replay = Replay([model.get_submodule(layer) for layer in layers], forwards)
    one_layer = _gptq_layer if method == "gptq" else _awq_layer
    quantized: dict[str, QuantizedTensor] = {}
    for number, layer in enumerate(layers):
        own = {name.removeprefix(f"{layer}."): s for name, s in schemes.items() if name.startswith(f"{layer}.")}
        found = one_layer(replay, number, own, rule)
        quantized.update({f"{layer}.{name}": tensor for name, tensor in found.items()})
        replay.advance(number)
        progress(number + 1, len(layers))
    return {name: quantized[name] for name in schemes}


def _gptq_layer(
    replay: Replay, number: int, schemes: Mapping[str, QuantScheme], rule: ScaleRule
) -> dict[str, QuantizedTensor]:
    layer, found = replay.layers[number], {}
    for stage in STAGES:
        names = [name for name in stage.linears if name in schemes]
        if not names:
            continue
        (moments,) = replay.moments(number, [layer.get_submodule(names[0])])
        for name in names:
            weight = layer.get_submodule(name).weight
            found[name] = gptq_quantize(weight, moments.hessian, schemes[name], rule)
            weight.copy_(bake(found[name]))
    return found


def _awq_layer(
    replay: Replay, number: int, schemes: Mapping[str, QuantScheme], rule: ScaleRule
) -> dict[str, QuantizedTensor]:
    layer = replay.layers[number]
    stages = [stage for stage in STAGES if any(name in schemes for name in stage.linears)]
    firsts = [next(name for name in stage.linears if name in schemes) for stage in stages]
    found = replay.moments(number, [layer.get_submodule(name) for name in firsts])
    weights = {name: layer.get_submodule(name).weight.float().clone() for name in schemes}
    hessians = {
        name: scaled
        for stage, moments in zip(stages, found, strict=True)
        for name, scaled in _fold(layer, stage, schemes, weights, moments).items()
    }
    result = {}
    for name, scheme in schemes.items():
        scale = awq_scale(weights[name], hessians[name], scheme, rule)
        result[name] = quantize_tensor(weights[name], scale, scheme)
        layer.get_submodule(name).weight.copy_(bake(result[name]))
    return result


def _fold(
    layer: Any,
    stage: Stage,
    schemes: Mapping[str, QuantScheme],
    weights: dict[str, torch.Tensor],
    moments: Moments,
) -> dict[str, torch.Tensor]:
    """Enlarge a stage's ``weights`` and shrink their source, where that is exact; the Hessian each then has."""
    names = [name for name in stage.linears if name in schemes]
    source, hessian = layer.get_submodule(stage.source), moments.hessian
    is_norm = stage.source.endswith("norm")
    # Exact only if every reader is enlarged, and each output channel of the source is one input channel here.
    is_exact = len(names) == len(stage.linears) and (
        is_norm or (stage.source in weights and len(weights[stage.source]) == len(hessian))
    )
    if is_exact:
        scale, alpha = search_scale([weights[name] for name in names], [schemes[name] for name in names], moments)
        if alpha > 0:
            if is_norm:
                scale = shrink_norm(source, scale)
            else:
                weights[stage.source] /= scale.unsqueeze(1)
                if source.bias is not None:
                    source.bias.copy_((source.bias.float() / scale).to(torch.bfloat16))
            for name in names:
                weights[name] *= scale
            hessian = hessian / scale / scale.unsqueeze(1)
    return dict.fromkeys(names, hessian)
