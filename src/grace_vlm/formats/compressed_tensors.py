"""compressed-tensors ``pack-quantized``, W4A16 and W8A16: what Transformers and vLLM load without us.

A quantized linear has no ``.weight`` but

    <module>.weight_packed   int32 (out, in * bits / 32)    u = q + 2^(b-1), along in_features, lowest bits first
    <module>.weight_scale    BF16  (out, in / group_size)
    <module>.weight_shape    int64 (2,) = (out, in)

and ``config.json`` gets ``quantization_config``. Scales must be BF16: Transformers' default mode casts them to the
model's dtype, so FP32 scales would change the weights on loading (28 of 28 layers when we tried). Names in ``ignore``
and ``targets`` match in two name spaces, Transformers' ``model.language_model.layers.0...`` and vLLM's
``language_model.model.layers.0...``. vLLM fuses q, k, v and gate, up: the members of a fused group must share a scheme.

A model of several schemes gets several ``config_groups``. Load such a folder in Transformers' default mode: 5.23 with
``CompressedTensorsConfig(dequantize=True)`` decodes every layer by the first group (it raises, as our tests note).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.lazy import TensorSpec
from grace_vlm.formats.packed import Grid, PackedLayout, split_fused_group
from grace_vlm.formats.weights import Weights
from grace_vlm.quant.packing import pack_rows, unpack_rows
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

# Whole parts that stay dense, by the patterns that ignore them in both name spaces; their members are not listed.
_DENSE_PARTS = {
    "lm_head": ("lm_head", r"re:.*\.lm_head$"),
    "visual": ("re:.*visual.*",),
    "vision_tower": ("re:.*vision_tower.*",),
    "multi_modal_projector": ("re:.*multi_modal_projector.*",),
}


def _pattern(module: str) -> str:
    """A compressed-tensors regular expression that matches ``module`` in both name spaces."""
    rest = module.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    return rf"re:(model\.)?(language_model\.)?(model\.)?{re.escape(rest)}$"


def _weights_config(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer_kwargs": {},
    }


def quantization_config(linears: Mapping[str, PlanEntry], bf16_names: tuple[str, ...]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``: one group if there is one scheme, else explicit targets."""
    schemes: dict[tuple[int, int], tuple[QuantScheme, list[str]]] = {}
    for name, entry in linears.items():
        assert entry.scheme is not None
        key = (entry.scheme.num_bits, entry.scheme.group_size)
        schemes.setdefault(key, (entry.scheme, []))[1].append(name)
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(schemes) == 1 else [_pattern(name) for name in names],
            "weights": _weights_config(scheme),
            "input_activations": None,
            "output_activations": None,
        }
        for index, (scheme, names) in enumerate(schemes.values())
    }
    # A part with a grid in it cannot be ignored as a whole.
    dense_parts = [part for part in _DENSE_PARTS if not any(part in name.split(".") for name in linears)]
    others = [name for name in bf16_names if not any(part in name.split(".") for part in dense_parts)]
    # The head and the tower of Qwen are ignored whether or not they are listed (a tied head is not).
    ignored = [
        p for part in dense_parts if part in ("lm_head", "visual") or _has(bf16_names, part) for p in _DENSE_PARTS[part]
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*ignored, *(_pattern(name) for name in others)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _has(names: Iterable[str], part: str) -> bool:
    return any(part in name.split(".") for name in names)


def _refusal_of(name: str, scheme: QuantScheme) -> str | None:
    """Why the layout cannot hold one linear on this grid."""
    if name.endswith("embed_tokens"):
        return f"{name} is an embedding with a grid; compressed-tensors packs linears: leave quant.head in bf16"
    if scheme.num_bits not in (4, 8):
        return f"{name} is {scheme.name}; compressed-tensors packs 4 or 8 bits: quantize to w4g128 or w8g128"
    return None


def _read_grids(folder: Path, stated: Mapping[str, Any]) -> list[Grid]:
    """The grids of the groups of a ``quantization_config``; ``FormatError`` for other kinds."""
    if stated.get("format") != "pack-quantized":
        raise FormatError(f"{folder} has compressed-tensors format {stated.get('format')!r}; expected 'pack-quantized'")
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError(f"{folder} has no config_groups in its quantization_config")
    found: list[Grid] = []
    for label, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("input_activations") or group.get("output_activations"):
            raise FormatError(f"{folder}: {label} quantizes activations or no weights; expected weights only")
        bits, size = weights.get("num_bits"), weights.get("group_size")
        expected = {"type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
        wrong = {key: weights.get(key) for key, value in expected.items() if weights.get(key) != value}
        if weights.get("actorder"):
            wrong["actorder"] = weights["actorder"]
        if wrong or type(bits) is not int or bits not in (4, 8) or type(size) is not int or size < 1:
            raise FormatError(
                f"{folder}: {label} is num_bits {bits!r}, group_size {size!r}, {wrong or 'else as expected'}; "
                "expected 4 or 8 bits, symmetric int groups, static, without actorder"
            )
        found.append((bits, size))
    return found


class CompressedTensors(PackedLayout):
    """The converter; see the head of the file for the bytes."""

    name = "compressed-tensors"
    scale_dtype = torch.bfloat16
    marker, scale_part = "weight_packed", "weight_scale"

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        for name, entry in linears.items():
            assert entry.scheme is not None
            if (reason := _refusal_of(name, entry.scheme)) is not None:
                return reason
        return split_fused_group(linears, dense_names)

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        stated = config.get("quantization_config")
        return isinstance(stated, dict) and stated.get("quant_method") == "compressed-tensors"

    def take_statement(self, folder: Path, config: dict[str, Any]) -> list[Grid]:
        return _read_grids(folder, config.pop("quantization_config"))

    def statement(self, content: ModelContent) -> dict[str, Any]:
        return {"quantization_config": quantization_config(content.linears, content.bf16_names)}

    def parts(self, entry: PlanEntry) -> dict[str, TensorSpec]:
        assert entry.scheme is not None
        out_features, words = entry.out_features, entry.in_features * entry.scheme.num_bits // 32
        return {
            "weight_packed": TensorSpec(torch.int32, (out_features, words)),
            "weight_scale": TensorSpec(torch.bfloat16, (out_features, entry.in_features // entry.scheme.group_size)),
            "weight_shape": TensorSpec(torch.int64, (2,)),
        }

    def features(self, name: str, weights: Weights, grid: Grid) -> tuple[int, int] | None:
        shape = f"{name}.weight_shape"
        if shape not in weights or weights.spec(shape) != TensorSpec(torch.int64, (2,)):
            return None
        out_features, in_features = (int(size) for size in weights[shape])
        return out_features, in_features

    def encode(self, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": pack_rows(tensor.codes, tensor.scheme.num_bits),
            "weight_scale": tensor.scale.to(torch.bfloat16),
            "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], entry: PlanEntry) -> torch.Tensor:
        assert entry.scheme is not None
        return unpack_rows(parts["weight_packed"], entry.scheme.num_bits, entry.in_features)
