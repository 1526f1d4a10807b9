"""A decoder's weights as the engine runs them: one product for q, k and v, one for gate and up, norms beside them.

Taken from a Transformers model of any family we know (grouped attention, RMS norms, SwiGLU; norms on q and k or biases
where a family has them). What is quantized and can run by a low-bit kernel is packed for it; everything else is a plain
product in the model's dtype. The model's own layers are let go, so that no weight is held twice.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from grace_vlm.engine.linear import Linear, Weight, address, detached, num_bytes
from grace_vlm.engine.vocabulary import Embeddings, Head, take_vocabulary
from grace_vlm.errors import ConfigError
from grace_vlm.kernels.cpu import missing
from grace_vlm.kernels.decoder_rows import Norm
from grace_vlm.kernels.fragments import has_kernel
from grace_vlm.kernels.heads import Heads
from grace_vlm.kernels.int4pack import pack_int4, takes_int4pack
from grace_vlm.kernels.low_bit_cpu import pack_panels, takes
from grace_vlm.kernels.low_bit_linear import PackedLinear, interleaved, joined, pack_linear
from grace_vlm.quant.scheme import QuantizedTensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer; ``query_norm`` and ``key_norm`` are over a head's numbers, None in families without."""

    attention_norm: Norm
    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    attention_out: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


def _require_known(config: Any) -> None:
    """``ConfigError`` for what the forward does not do."""
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"the decoder's activation is {activation!r}; the engine has silu")
    if getattr(config, "use_sliding_window", False):
        raise ConfigError(
            "the decoder attends in a sliding window, which the engine does not; set use_sliding_window to false in "
            "config.json if prompts and answers stay below it"
        )
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary in ("dynamic", "longrope"):
        raise ConfigError(
            f"the decoder's rope_type is {rotary!r}, whose angles depend on a prompt's length; the engine has those "
            "that depend on the position alone"
        )


Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Weights:
    """Of a decoder and its head.

    Args:
        embeddings, head: of V words. last_norm: before the head.
        rotary: (x, (3, n) positions) -> cos, sin, (n, head_dim) each.
        num_heads, num_kv_heads, head_dim: of attention.
    """

    embeddings: Embeddings
    layers: tuple[Layer, ...]
    last_norm: Norm
    head: Head
    rotary: Rotary
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def heads(self, layer: Layer) -> Heads:
        """A layer's attention as kernels are told of it."""
        q, k = layer.query_norm, layer.key_norm
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim)
        return Heads(*sizes) if q is None or k is None else Heads(*sizes, q.weight, k.weight, q.epsilon)

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def width(self) -> int:
        """d"""
        return len(self.last_norm.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    @property
    def products(self) -> tuple[Weight, ...]:
        """The weights of all products."""
        linears = (linear for layer in self.layers for linear in linears_of(layer))
        return self.head.linear.weight, *(linear.weight for linear in linears)

    @property
    def num_bytes(self) -> int:
        """Of all that is read while tokens are made; a tied head once."""
        weights = (self.embeddings.weight, *self.products)
        return sum({address(weight): num_bytes(weight) for weight in weights}.values())


def linears_of(layer: Layer) -> tuple[Linear, ...]:
    """The four products of a layer."""
    return layer.qkv, layer.attention_out, layer.gate_up, layer.down


def take_weights(
    model: Any,
    head: nn.Linear,
    quantized: Mapping[str, QuantizedTensor],
    rows: int | None = None,
    int8_head: bool = False,
    exact: bool = False,
) -> Weights:
    """The weights of a vision-language model's decoder; its own layers are empty after.

    Args:
        model: Transformers' model, on its device, in the dtype of the activations.
        quantized: codes and scales by module name, which run by low-bit kernels where there are any.
        rows, exact: of every product, see ``Linear``. int8_head: see ``take_vocabulary``.

    Raises:
        ConfigError: another engine has the layers already, or the forward does not do what they need.
    """
    language = model.model.language_model
    config = language.config
    _require_known(config)
    if len(language.layers) != config.num_hidden_layers:
        raise ConfigError(
            f"the model has {len(language.layers)} of its {config.num_hidden_layers} layers: another engine took the "
            "others; open the model once for each"
        )
    layers = []
    for number in range(len(language.layers)):
        name = f"model.language_model.layers.{number}"
        layers.append(_layer(language.layers[number], name, quantized, rows, exact))
        language.layers[number] = nn.Identity()
    language.layers = nn.ModuleList()
    embeddings, last = take_vocabulary(language.embed_tokens, head, rows, int8_head, exact)
    heads = config.num_attention_heads
    return Weights(
        embeddings=embeddings,
        layers=tuple(layers),
        last_norm=_norm(language.norm),
        head=last,
        rotary=_rotary(language),
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _rotary(language: Any) -> Rotary:
    """Transformers' own module, with what it wants of the positions: all three rows, or one where they are plain."""
    module = language.rotary_emb
    has_rows = "mrope_section" in (getattr(language.config, "rope_parameters", None) or {})

    def rotary(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = module(x.unsqueeze(0), positions.unsqueeze(1) if has_rows else positions[:1])
        return cos[0], sin[0]

    return rotary


def _layer(layer: Any, name: str, quantized: Mapping[str, QuantizedTensor], rows: int | None, exact: bool) -> Layer:
    own, mlp = layer.self_attn, layer.mlp

    def linear(parts: Sequence[tuple[str, nn.Linear]], silu: bool = False) -> Linear:
        names, modules = [f"{name}.{part}" for part, _ in parts], [module for _, module in parts]
        return replace(_linear(names, modules, quantized, silu, exact), rows=rows, exact=exact)

    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=linear([(f"self_attn.{x}_proj", getattr(own, f"{x}_proj")) for x in "qkv"]),
        query_norm=_norm(own.q_norm) if hasattr(own, "q_norm") else None,
        key_norm=_norm(own.k_norm) if hasattr(own, "k_norm") else None,
        attention_out=linear([("self_attn.o_proj", own.o_proj)]),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=linear([("mlp.gate_proj", mlp.gate_proj), ("mlp.up_proj", mlp.up_proj)], silu=True),
        down=linear([("mlp.down_proj", mlp.down_proj)]),
    )


def _linear(
    names: Sequence[str],
    modules: Sequence[nn.Linear],
    quantized: Mapping[str, QuantizedTensor],
    silu: bool,
    exact: bool,
) -> Linear:
    """Modules of one input as one product; packed if all of them are quantized alike and a kernel takes them."""
    biases = [module.bias for module in modules]
    assert len({bias is None for bias in biases}) == 1, "layers that are one product have biases together"
    bias = None if biases[0] is None else torch.cat([detached(b) for b in biases])  # type: ignore[misc]
    if all(name in quantized for name in names):
        tensors = [quantized[name] for name in names]
        if all(tensor.scheme == tensors[0].scheme for tensor in tensors):
            packed = _packed(tensors, modules[0].weight.device, silu, exact)
            assert not (silu and bias is not None and isinstance(packed, PackedLinear))
            if packed is not None:
                return Linear(packed, bias, silu)
    return Linear(torch.cat([module.weight.detach() for module in modules]), bias, silu)


def _packed(tensors: list[QuantizedTensor], device: torch.device, silu: bool, exact: bool) -> Weight | None:
    """One weight for all of ``tensors``, in the form of the device's kernel; None if there is none for them."""
    if device.type == "cuda" and all(map(has_kernel, tensors)):
        return pack_linear(interleaved(*tensors) if silu else joined(tensors), device)
    if device.type != "cpu":
        return None
    if reason := missing():
        _say_once(reason)
        return pack_int4(joined(tensors)) if not exact and all(map(takes_int4pack, tensors)) else None
    return pack_panels(joined(tensors)) if all(map(takes, tensors)) else None


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger("grace_vlm").warning(
        "%s: 4-bit weights run by torch's own operator in BF16, or in FP32 with cpu_activations=fp32; others in FP32",
        reason,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)
