"""Toy models of every family with rows to calibrate on, in the precision that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from toy_run import COLOURS, write_rows

from grace_vlm.models.load import LoadedModel
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor
from grace_vlm.ptq.calibration import Calibration, calibration_entries, calibration_replay
from grace_vlm.ptq.replay import Replay

FAMILIES = {"Qwen3-VL": "tiny", "Qwen2-VL": "qwen2_vl", "LLaVA-1.5": "llava"}


def load_toy(family: str, dtype: torch.dtype) -> LoadedModel:
    """A toy whose norms and biases are no ones and zeros, all values BF16's."""
    processor = build_toy_processor(["what color is the square?", *COLOURS] * 3, 320, size=FAMILIES[family])
    model: Any = build_toy_model(FAMILIES[family], processor).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(len(parameter), generator=generator), alpha=0.3)
            if name.endswith("norm.weight"):
                # A few loud channels: what AWQ is for.
                parameter[:: max(1, len(parameter) // 8)] *= 8
    model = model.to(torch.bfloat16).to(dtype)
    return LoadedModel(model, processor, adapter_for(model.config.model_type), "toy")


def replay_of(loaded: LoadedModel, folder: Path) -> Replay:
    """Its layers on eight rows with pictures."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(folder, num_rows=8)
    return calibration_replay(loaded, calibration_entries(loaded, Calibration(rows)))
