"""AutoAWQ GEMM (``version: "gemm"``), W4 only: what vLLM, SGLang and Transformers (with gptqmodel) load as AWQ.

A quantized linear has no ``.weight`` but

    <module>.qweight   int32 (in, out / 8)            u = q + 8; nibble k of word c is output 8c + [0,2,4,6,1,3,5,7][k]
    <module>.qzeros    int32 (in / group_size, out / 8)   every nibble 8: 0x88888888
    <module>.scales    FP16  (in / group_size, out)

w = (u - 8) s. ``modules_to_not_convert`` is read as a regular expression from the start of a name or as its suffix by
Transformers, and as a part of its own names by vLLM: so a dense part stands there twice, ``visual`` and
``model.visual``. With ``visual`` missing in either spelling one of the two would convert the vision tower.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.lazy import TensorSpec
from grace_vlm.formats.packed import Grid, PackedLayout, dense_modules, one_grid, refuse_beyond_decoder, stated_grid
from grace_vlm.formats.weights import Weights
from grace_vlm.quant.packing import pack_interleaved, unpack_interleaved
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor

ZERO_WORD = -0x77777778
"""Eight zero points of 8, 0x88888888, as an int32."""


class Awq(PackedLayout):
    """The converter; see the head of the file for the bytes."""

    name = "awq"
    scale_dtype = torch.float16
    marker, scale_part = "qweight", "scales"

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        stated = config.get("quantization_config")
        return isinstance(stated, dict) and stated.get("quant_method") == "awq"

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        return refuse_beyond_decoder(self.name, linears, (4,), dense_names)

    def take_statement(self, folder: Path, config: dict[str, Any]) -> list[Grid]:
        stated = config.pop("quantization_config")
        version = stated.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise FormatError(f"{folder} is AWQ of version {version!r}; expected 'gemm'")
        grid = stated_grid(folder, "quantization_config", stated.get("bits"), stated.get("group_size"))
        if grid[0] != 4:
            raise FormatError(f"{folder} says AWQ of {grid[0]} bits; AWQ GEMM holds 4")
        return [grid]

    def statement(self, content: ModelContent) -> dict[str, Any]:
        parts, single = dense_modules(content)
        spelled = [name for part in parts if part != "lm_head" for name in (part, f"model.{part}")]
        return {
            "quantization_config": {
                "quant_method": "awq",
                "bits": 4,
                "group_size": one_grid(self.name, content.linears)[1],
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": [*spelled, "lm_head", *single],
            }
        }

    def parts(self, entry: PlanEntry) -> dict[str, TensorSpec]:
        assert entry.scheme is not None
        words, groups = entry.out_features // 8, entry.in_features // entry.scheme.group_size
        return {
            "qweight": TensorSpec(torch.int32, (entry.in_features, words)),
            "qzeros": TensorSpec(torch.int32, (groups, words)),
            "scales": TensorSpec(torch.float16, (groups, entry.out_features)),
        }

    def features(self, name: str, weights: Weights, grid: Grid) -> tuple[int, int] | None:
        shape = weights.shape(f"{name}.qweight")
        return (8 * shape[1], shape[0]) if len(shape) == 2 else None

    def scale_of(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.t().contiguous()

    def encode(self, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        groups = tensor.scale.shape[1]
        return {
            "qweight": pack_interleaved(tensor.codes),
            "qzeros": torch.full((groups, tensor.shape[0] // 8), ZERO_WORD, dtype=torch.int32),
            "scales": tensor.scale.to(torch.float16).t().contiguous(),
        }

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], entry: PlanEntry) -> torch.Tensor:
        if not bool((parts["qzeros"] == ZERO_WORD).all()):
            raise FormatError(f"{name} has zero points other than 8; only symmetric AWQ can be read")
        return unpack_interleaved(parts["qweight"], entry.out_features)
