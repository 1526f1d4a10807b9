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
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import Lazy, ModelContent, copy_companions, refuse, summary, write_config
from grace_vlm.formats.folder import check_tensor
from grace_vlm.formats.weights import Weights, linears_among, open_weights, write_weights
from grace_vlm.quant.packing import pack_rows, unpack_rows
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
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
    if scheme.scale_rounding == "fp32":
        return (
            f"{name} has FP32 scales, which runtimes round to BF16 on loading, so other weights would run than "
            "were trained; train or quantize with scale_rounding=bf16"
        )
    return None


def _read_schemes(folder: Path, stated: Mapping[str, Any]) -> dict[tuple[int, int], QuantScheme]:
    """(num_bits, group_size) -> scheme, of the groups of a ``quantization_config``; ``FormatError`` for other kinds."""
    if stated.get("format") != "pack-quantized":
        raise FormatError(f"{folder} has compressed-tensors format {stated.get('format')!r}; expected 'pack-quantized'")
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError(f"{folder} has no config_groups in its quantization_config")
    found: dict[tuple[int, int], QuantScheme] = {}
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
        found[bits, size] = QuantScheme(bits, size)
    return found


class CompressedTensors:
    """The converter; see the head of the file for the bytes."""

    name = "compressed-tensors"

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        for name, entry in linears.items():
            scheme = entry.scheme
            assert scheme is not None
            if (reason := _refusal_of(name, scheme)) is not None:
                return reason
            parent, _, leaf = name.rpartition(".")
            for group in (group for group in _FUSED if leaf in group):
                for other in (f"{parent}.{member}" for member in group):
                    found = linears[other].scheme if other in linears else None
                    exists = found is not None or f"{other}.weight" in dense_names
                    if exists and (found is None or found.name != scheme.name):
                        return (
                            f"{name} is {scheme.name} but {other} is {found.name if found else 'bf16'}; "
                            f"vLLM fuses {', '.join(group)}: give them one scheme"
                        )
        return None

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        stated = config.get("quantization_config")
        return isinstance(stated, dict) and stated.get("quant_method") == "compressed-tensors"

    def inspect(self, folder: Path) -> dict[str, Any]:
        return summary(self.read(folder))

    def read(self, folder: Path) -> ModelContent:
        config, weights = read_object(folder / "config.json", FormatError), open_weights(folder)
        schemes = _read_schemes(folder, config.pop("quantization_config"))
        names = [name.removesuffix(".weight_packed") for name in weights if name.endswith(".weight_packed")]
        entries = {name: self._entry(folder, weights, name, schemes) for name in names}
        taken = {f"{name}.{part}" for name in names for part in _PARTS}
        dense = [name for name in weights if name not in taken]
        odd = next((n for n in dense if n.rpartition(".")[2].startswith("weight_")), None)
        if odd is not None:
            raise FormatError(f"{folder} has {odd}, which symmetric pack-quantized linears do not; expected {_PARTS}")

        def load(name: str) -> QuantizedTensor:
            entry = entries[name]
            assert entry.scheme is not None
            packed, scale = weights[f"{name}.weight_packed"], weights[f"{name}.weight_scale"]
            if packed.dtype != torch.int32:
                raise FormatError(f"{name}.weight_packed is {packed.dtype}; expected torch.int32")
            codes = unpack_rows(packed, entry.scheme.num_bits, entry.in_features)
            return check_tensor(name, QuantizedTensor(codes, scale, entry.scheme), entry)

        return ModelContent(
            layout=self.name,
            folder=folder,
            config=config,
            linears=entries,
            quantized=Lazy(entries, load),
            baked={},
            dense=Lazy(dense, weights.__getitem__),
            bf16_names=linears_among(weights, dense),
        )

    def _entry(
        self, folder: Path, weights: Weights, name: str, schemes: Mapping[tuple[int, int], QuantScheme]
    ) -> PlanEntry:
        """Shape and scheme of a packed linear, from its own three tensors, checked against the configuration."""
        missing = [part for part in _PARTS if f"{name}.{part}" not in weights]
        if missing:
            raise FormatError(f"{folder}: {name} lacks {', '.join(missing)}")
        packed, scale = (weights.shape(f"{name}.{part}") for part in _PARTS[:2])
        if weights.shape(f"{name}.weight_shape") != (2,) or len(packed) != 2 or len(scale) != 2:
            raise FormatError(
                f"{folder}: {name} has tensors of a wrong rank; expected (out, words), (out, groups), (2,)"
            )
        out_features, in_features = (int(size) for size in weights[f"{name}.weight_shape"])
        for (bits, size), scheme in schemes.items():
            fits = in_features % size == 0 and scale == (out_features, in_features // size)
            if fits and packed == (out_features, in_features * bits // 32):
                return PlanEntry(name, out_features, in_features, scheme)
        raise FormatError(
            f"{folder}: {name} says it is {out_features} x {in_features}, but its words are {packed} and its scales "
            f"{scale}; that fits none of {', '.join(scheme.name for scheme in schemes.values())}"
        )

    def write(self, content: ModelContent, stage: Path) -> None:
        refuse(self, content)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from content.dense.items()
            for name, tensor in content.quantized.items():
                yield f"{name}.weight_packed", pack_rows(tensor.codes, tensor.scheme.num_bits)
                yield f"{name}.weight_scale", tensor.scale
                yield f"{name}.weight_shape", torch.tensor(tensor.shape, dtype=torch.int64)

        write_weights(stage, tensors())
        stated = quantization_config(content.linears, content.bf16_names)
        write_config(stage, {**content.config, "quantization_config": stated})
        copy_companions(content.folder, stage)
