"""What is this folder? A sentence's worth of facts, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.manifest import is_complete
from grace_vlm.checkpoint.store import load_checkpoint
from grace_vlm.errors import FormatError
from grace_vlm.formats.folder import is_model_folder, read_plan, resolve_model
from grace_vlm.formats.registry import detect, read_model
from grace_vlm.formats.weights import open_weights, weight_bytes


def inspect_folder(path: Path) -> dict[str, Any]:
    """Kind of folder, bytes, model type, grid.

    Raises:
        FormatError: it is neither a model, a run nor a checkpoint.
    """
    if (path / "state.json").is_file():
        state = load_checkpoint(path)
        return {
            "kind": "checkpoint",
            "step": state.step,
            "masters": len(state.masters),
            "log_scales": len(state.log_scales),
            "fingerprint": state.fingerprint,
        }
    if not is_model_folder(path) and not (path / "final").is_dir():
        raise FormatError(f"{path} is no model folder, run folder or checkpoint; expected config.json or final/ in it")
    return {"kind": "model" if is_model_folder(path) else "run", **_model_facts(resolve_model(path))}


def _model_facts(folder: Path) -> dict[str, Any]:
    weights = open_weights(folder)
    facts: dict[str, Any] = {
        "folder": str(folder),
        "published_whole": is_complete(folder),
        "weight_bytes": weight_bytes(folder),
        "tensors": len(weights),
    }
    has_grid = (folder / "grid").is_dir() or "quantization_config" in (folder / "config.json").read_text("utf-8")
    if not has_grid and not (folder / "qat_quantized_weights.bin").is_file():
        return {**facts, "layout": "bf16", "linears": []}
    content = read_model(folder)
    bf16_names = read_plan(folder)[1] if (folder / "grid").is_dir() else content.bf16_names
    return {
        **facts,
        "layout": detect(folder).name,
        "quantized_linears": len(content.linears),
        "bf16_linears": len(bf16_names),
        "linears": [
            {
                "name": entry.name,
                "out_features": entry.out_features,
                "in_features": entry.in_features,
                "scheme": entry.scheme.name if entry.scheme else "bf16",
            }
            for entry in content.linears.values()
        ],
    }
