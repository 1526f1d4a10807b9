"""The layouts there are, and which one a folder is of. A new layout is one file and one entry in ``converters``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.strict_json import shown
from grace_vlm.errors import ConfigError, FormatError
from grace_vlm.formats.awq import Awq
from grace_vlm.formats.compressed_tensors import CompressedTensors
from grace_vlm.formats.converter import Converter, ModelContent
from grace_vlm.formats.folder import ModelFolder
from grace_vlm.formats.gguf import Gguf
from grace_vlm.formats.gptq import Gptq
from grace_vlm.formats.mlx import Mlx
from grace_vlm.formats.official_awq import OfficialAwq
from grace_vlm.formats.qat import Official
from grace_vlm.formats.rounding import keeps_fp32_scales
from grace_vlm.formats.sidecar import SIDECAR
from grace_vlm.formats.weights import read_inside
from grace_vlm.models.adapter import Adapter, stored_name
from grace_vlm.quant.plan import PlanEntry, QuantPlan


def converters() -> dict[str, Converter]:
    """Every layout by name. The first that matches a folder reads it: those with marks of their own come first."""
    layouts: tuple[Converter, ...] = (
        OfficialAwq(),
        Official(),
        CompressedTensors(),
        Awq(),
        Gptq("gptq"),
        Gptq("gptq_v2"),
        Mlx(),
        Gguf(),
        ModelFolder(),
    )
    return {layout.name: layout for layout in layouts}


def converter_for(name: str) -> Converter:
    """The layout called ``name``; ``ConfigError`` lists them."""
    found = converters()
    if name not in found:
        raise ConfigError(f"unknown format {shown(name)}; expected one of {', '.join(found)}")
    return found[name]


def refusals(plan: QuantPlan, adapter: Adapter) -> dict[str, str | None]:
    """For each layout, why it cannot hold a planned model exactly, in the names of its files; None where it can."""
    linears = {stored_name(adapter, entry.name): entry for entry in plan.entries if entry.scheme is not None}
    dense = {stored_name(adapter, f"{entry.name}.weight") for entry in plan.entries if entry.scheme is None}
    if not linears:
        return {}
    return {name: _refusal(converter, linears, dense) for name, converter in converters().items()}


def _refusal(converter: Converter, linears: dict[str, PlanEntry], dense: set[str]) -> str | None:
    reason = converter.refusal(linears, dense)
    in_fp32 = any(entry.scheme and entry.scheme.scale_rounding == "fp32" for entry in linears.values())
    if reason is None and in_fp32 and not keeps_fp32_scales(converter):
        return "rounds FP32 scales (pack --allow-rounding); train with scale_rounding=bf16"
    return reason


def detect(folder: Path) -> Converter:
    """The layout of a model folder; ``FormatError`` if it is none of ours."""
    config = read_inside(folder, "config.json") if (folder / "config.json").is_file() else {}
    for converter in converters().values():
        if converter.matches(folder, config):
            return converter
    raise FormatError(_unknown(folder, config))


def _unknown(folder: Path, config: dict[str, Any]) -> str:
    """Why a folder is of no layout."""
    stated, file = config.get("quantization_config"), folder / "config.json"
    if "quantization_config" in config and not isinstance(stated, dict):
        what = "null" if stated is None else shown(stated)
        return f"{file} has quantization_config {what}; expected an object, or no such key for BF16 weights"
    if stated is None and "qat" in config:
        return f"{file} has a 'qat' section, and its scales are not there; put {SIDECAR} beside it"
    method = stated.get("quant_method") if stated else None
    if stated is not None and method is None:
        return f"{file} has a quantization_config without quant_method; expected the name of a layout there"
    return f"{folder} is of an unknown layout (quant_method {shown(method)}); readable are {', '.join(converters())}"


def read_model(folder: Path) -> ModelContent:
    """Open a model folder of any known layout."""
    return detect(folder).read(folder)


def validate(folder: Path) -> ModelContent:
    """Read every tensor of a folder once; ``FormatError`` names the first that is wrong. Returns the content."""
    return detect(folder).validate(folder)
