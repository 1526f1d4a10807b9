"""GPTQ without act-order, W4 and W8: what vLLM, SGLang and Transformers (gptqmodel and optimum) load as GPTQ.

A quantized linear has no ``.weight`` but

    <module>.qweight   int32 (in * bits / 32, out)            u = q + 2^(b-1), along in_features, lowest bits first
    <module>.qzeros    int32 (in / group_size, out * bits / 32)   along out_features; see below
    <module>.scales    FP16  (in / group_size, out)
    <module>.g_idx     int32 (in,)                            the group of each input: k // group_size

The zero point is 2^(b-1). ``checkpoint_format: "gptq"`` (v1, what every reader takes) stores it less one, and the
reader adds one: words 0x77777777 and 0x7f7f7f7f. ``"gptq_v2"`` stores it as it is: 0x88888888 and 0x80808080. A folder
that states neither is v1.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.lazy import TensorSpec
from grace_vlm.formats.packed import Grid, PackedLayout, dense_modules, one_grid, refuse_beyond_decoder, stated_grid
from grace_vlm.formats.weights import Weights
from grace_vlm.quant.packing import pack_columns, unpack_columns
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor


def zero_word(num_bits: int, version: str) -> int:
    """The int32 word of ``qzeros`` in a symmetric checkpoint."""
    zero = (1 << (num_bits - 1)) - (1 if version == "gptq" else 0)
    word = sum(zero << shift for shift in range(0, 32, num_bits))
    return word - (1 << 32) if word >= 1 << 31 else word


class Gptq(PackedLayout):
    """The converter of one version, ``gptq`` (v1) or ``gptq_v2``; see the head of the file for the bytes."""

    scale_dtype = torch.float16
    marker, scale_part = "qweight", "scales"

    def __init__(self, version: str) -> None:
        self.name = version

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        stated = config.get("quantization_config")
        if not isinstance(stated, dict) or stated.get("quant_method") != "gptq":
            return False
        return (stated.get("checkpoint_format") == "gptq_v2") == (self.name == "gptq_v2")

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        return refuse_beyond_decoder(self.name, linears, (4, 8), dense_names)

    def take_statement(self, folder: Path, config: dict[str, Any]) -> list[Grid]:
        stated = config.pop("quantization_config")
        version = stated.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise FormatError(f"{folder} says checkpoint_format {version!r}; expected 'gptq' or 'gptq_v2'")
        if stated.get("desc_act", False) is not False or stated.get("sym", True) is not True:
            raise FormatError(f"{folder} is GPTQ with desc_act or without sym; expected desc_act false, sym true")
        return [stated_grid(folder, "quantization_config", stated.get("bits"), stated.get("group_size"))]

    def statement(self, content: ModelContent) -> dict[str, Any]:
        bits, group_size = one_grid(self.name, content.linears)
        parts, single = dense_modules(content)
        dynamic = [f"-:.*{part}.*" for part in parts if part != "lm_head"]
        dynamic += [f"-:.*{re.escape(name)}$" for name in single]
        return {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": bits,
                "group_size": group_size,
                "sym": True,
                "desc_act": False,
                "lm_head": False,
                "true_sequential": True,
                "damp_percent": 0.01,
                "static_groups": False,
                "checkpoint_format": self.name,
                "pack_dtype": "int32",
                "dynamic": {pattern: {} for pattern in dynamic},
                "meta": {"quantizer": ["grace-vlm"]},
            }
        }

    def parts(self, entry: PlanEntry) -> dict[str, TensorSpec]:
        assert entry.scheme is not None
        bits, groups = entry.scheme.num_bits, entry.in_features // entry.scheme.group_size
        return {
            "qweight": TensorSpec(torch.int32, (entry.in_features * bits // 32, entry.out_features)),
            "qzeros": TensorSpec(torch.int32, (groups, entry.out_features * bits // 32)),
            "scales": TensorSpec(torch.float16, (groups, entry.out_features)),
            "g_idx": TensorSpec(torch.int32, (entry.in_features,)),
        }

    def features(self, name: str, weights: Weights, grid: Grid) -> tuple[int, int] | None:
        shape = weights.shape(f"{name}.qweight")
        return (shape[1], shape[0] * 32 // grid[0]) if len(shape) == 2 else None

    def scale_of(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.t().contiguous()

    def encode(self, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        bits, groups = tensor.scheme.num_bits, tensor.scale.shape[1]
        words = tensor.shape[0] * bits // 32
        return {
            "qweight": pack_columns(tensor.codes, bits),
            "qzeros": torch.full((groups, words), zero_word(bits, self.name), dtype=torch.int32),
            "scales": tensor.scale.to(torch.float16).t().contiguous(),
            "g_idx": _natural_order(tensor.shape[1], tensor.scheme.group_size),
        }

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], entry: PlanEntry) -> torch.Tensor:
        assert entry.scheme is not None
        bits = entry.scheme.num_bits
        if not bool((parts["qzeros"] == zero_word(bits, self.name)).all()):
            raise FormatError(
                f"{name} has zero points that are not those of symmetric {self.name} ({zero_word(bits, self.name)} a "
                "word); asymmetric GPTQ, or the other checkpoint_format, is not read"
            )
        if not torch.equal(parts["g_idx"], _natural_order(entry.in_features, entry.scheme.group_size)):
            raise FormatError(f"{name} has inputs in another order (g_idx, act-order); only natural order is read")
        return unpack_columns(parts["qweight"], bits, entry.in_features)


def _natural_order(in_features: int, group_size: int) -> torch.Tensor:
    return (torch.arange(in_features) // group_size).to(torch.int32)
