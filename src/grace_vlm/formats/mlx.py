"""MLX affine quantization, 4 and 8 bits: what mlx-lm and mlx-vlm load on Apple machines.

A quantized linear has

    <module>.weight   uint32 (out, in * bits / 32)     u = q + 2^(b-1), along in_features, lowest bits first
    <module>.scales   FP32 or FP16 (out, in / group_size)
    <module>.biases   the same; w = scales u + biases, so biases = -2^(b-1) scales

and ``config.json`` has ``quantization``, repeated as ``quantization_config``. MLX computes in the dtype of the scales.
u has one bit more than q, so FP16 is exact only for scales of at most 7 significant bits (``scale_rounding: sig5``);
everything else is written in FP32, which is exact always. Names stay the stock ones: mlx-vlm renames on loading.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.lazy import TensorSpec
from grace_vlm.formats.packed import Grid, PackedLayout, one_grid, refuse_beyond_decoder, stated_grid
from grace_vlm.formats.weights import Weights
from grace_vlm.quant.packing import pack_rows, unpack_rows
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme


def _scale_dtype(scheme: QuantScheme) -> torch.dtype:
    return torch.float16 if scheme.scale_rounding == "sig5" and scheme.num_bits == 4 else torch.float32


class Mlx(PackedLayout):
    """The converter; see the head of the file for the bytes."""

    name = "mlx"
    marker, scale_part = "biases", "scales"

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        stated = config.get("quantization")
        return isinstance(stated, dict) and "group_size" in stated

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        return refuse_beyond_decoder(self.name, linears, (4, 8), dense_names)

    def take_statement(self, folder: Path, config: dict[str, Any]) -> list[Grid]:
        stated = config.pop("quantization")
        config.pop("quantization_config", None)
        mode = stated.get("mode", "affine")
        own = [key for key, value in stated.items() if isinstance(value, dict)]
        if mode != "affine" or own:
            raise FormatError(
                f"{folder} is MLX of mode {mode!r} with {len(own)} modules of their own; expected affine, one grid"
            )
        return [stated_grid(folder, "quantization", stated.get("bits"), stated.get("group_size"))]

    def statement(self, content: ModelContent) -> dict[str, Any]:
        bits, group_size = one_grid(self.name, content.linears)
        stated = {"group_size": group_size, "bits": bits, "mode": "affine"}
        return {"quantization": stated, "quantization_config": stated}

    def parts(self, entry: PlanEntry) -> dict[str, TensorSpec]:
        assert entry.scheme is not None
        words = entry.in_features * entry.scheme.num_bits // 32
        scales = TensorSpec(
            _scale_dtype(entry.scheme), (entry.out_features, entry.in_features // entry.scheme.group_size)
        )
        return {
            "weight": TensorSpec(torch.uint32, (entry.out_features, words)),
            "scales": scales,
            "biases": scales,
        }

    def _fits(self, weights: Weights, key: str, spec: TensorSpec, part: str) -> bool:
        return super()._fits(weights, key, spec, "scales" if part == "biases" else part)

    def features(self, name: str, weights: Weights, grid: Grid) -> tuple[int, int] | None:
        if f"{name}.weight" not in weights:
            return None
        shape = weights.shape(f"{name}.weight")
        return (shape[0], shape[1] * 32 // grid[0]) if len(shape) == 2 else None

    def encode(self, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        bits = tensor.scheme.num_bits
        scales = tensor.scale.to(_scale_dtype(tensor.scheme))
        biases = scales * -float(1 << (bits - 1))
        if not bool(torch.isfinite(biases).all()):
            raise FormatError("a scale above 8188 has no FP16 bias; quantize with scale_rounding=bf16")
        return {"weight": pack_rows(tensor.codes, bits).view(torch.uint32), "scales": scales, "biases": biases}

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], entry: PlanEntry) -> torch.Tensor:
        assert entry.scheme is not None
        bits = entry.scheme.num_bits
        if not torch.equal(parts["biases"].float(), parts["scales"].float() * -float(1 << (bits - 1))):
            raise FormatError(f"{name} has biases other than -{1 << (bits - 1)} scales; only symmetric MLX can be read")
        return unpack_rows(parts["weight"].view(torch.int32), bits, entry.in_features)
