"""Every family at toy width as a published model folder with a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import TEXTS, build_tiny

from grace_vlm.formats.publish import publish_model
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_qwen_tokenizer
from grace_vlm.models.toy_families import build_family_model, build_family_processor
from grace_vlm.ptq.rtn import round_to_nearest
from grace_vlm.quant.scale_init import ScaleRule

FAMILIES = {"Qwen3-VL": "qwen3_vl", "Qwen2-VL": "qwen2_vl", "LLaVA-1.5": "llava"}


def build_family(name: str) -> tuple[Any, Any]:
    """(model, processor) of a family of ``FAMILIES``."""
    family = FAMILIES[name]
    if family == "qwen3_vl":
        return build_tiny()
    processor = build_family_processor(family, TEXTS * 4, build_qwen_tokenizer)
    return build_family_model(family, processor), processor


def write_family(folder: Path, name: str, scheme: str, rounding: Any = "bf16", rule: ScaleRule = "minmax") -> Path:
    """Publish a family's toy on a grid."""
    model, processor = build_family(name)
    adapter = adapter_for(model.config.model_type)
    plan = plan_model(model, adapter, scheme, scale_rounding=rounding)
    quantized = round_to_nearest(model, plan, rule)
    return publish_model(folder, model, processor, quantized, plan.bf16_names, "a toy\n")
