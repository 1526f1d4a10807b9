"""What is this folder? A model by module (bits, group, bytes, scales, clipped share), a run, or a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.checkpoint.manifest import is_complete
from grace_vlm.checkpoint.store import load_checkpoint
from grace_vlm.errors import FormatError
from grace_vlm.formats.certificate import read_certificate
from grace_vlm.formats.converter import CERTIFICATE, ModelContent
from grace_vlm.formats.folder import GRID, ModelFolder, is_model_folder, resolve_model
from grace_vlm.formats.lazy import spec_of
from grace_vlm.formats.qat import Official
from grace_vlm.formats.registry import detect
from grace_vlm.formats.weights import Weights, check_shard, open_weights, require_inside, weight_bytes
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor

_CODES = "codes-?????-of-?????.safetensors"
Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all)."""


def inspect_folder(path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Kind of folder, and of a model its layout, bytes against BF16, and every quantized linear.

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
    folder = resolve_model(path)
    facts: dict[str, Any] = {"kind": "model" if is_model_folder(path) else "run", "folder": str(folder)}
    facts["published_whole"] = is_complete(folder)
    if (folder / CERTIFICATE).is_file():
        facts["certificate"] = read_certificate(require_inside(folder / CERTIFICATE))["root"]
    return {**facts, **detect(folder).inspect(folder, progress)}


def linear_bytes(content: ModelContent) -> dict[str, int]:
    """What the tensors of each quantized linear take on the disk, but for its bias; from the headers of safetensors.

    The grid of our own layout counts beside the BF16 weights, and the official pickle, which holds the weights again.
    """
    found, folder = dict.fromkeys(content.linears, 0), content.folder
    files = [open_weights(folder)] if found else []
    if found and content.layout == ModelFolder.name:
        files.append(Weights(check_shard(folder / GRID, p.name, folder) for p in (folder / GRID).glob(_CODES)))
    for weights in files:
        for name in weights:
            module, _, part = name.rpartition(".")
            if module in found and part != "bias":
                found[module] += weights.spec(name).num_bytes
    if content.layout == Official.name:
        return {name: found[name] + entry.bf16_bytes + 4 * entry.num_scales for name, entry in content.linears.items()}
    return found


def inspect_content(
    content: ModelContent, linear_bytes: Mapping[str, int], progress: Progress | None = None
) -> dict[str, Any]:
    """Layout, counts, bytes on the disk and in BF16, and a record a quantized linear. Reads every code once.

    ``weight_bytes`` are those of all weight files; ``bf16_bytes`` those of the same model in BF16; ``clipped`` is the
    share of codes at an end of their range, ``negative`` that of scales below zero, ``scale_min`` and ``scale_max`` are
    magnitudes. ``bits_per_quantized_weight`` is what the layout stores of the quantized
    linears, ``grid_bits_per_quantized_weight`` what their codes and scales alone need.

    Args:
        linear_bytes: what each quantized linear takes on the disk.
    """
    weights = sum(entry.out_features * entry.in_features for entry in content.linears.values())
    stored = weight_bytes(content.folder)
    dense = {name: spec_of(content.dense, name) for name in content.dense}
    return {
        "layout": content.layout if content.linears else "bf16",
        "model_type": content.config.get("model_type"),
        "schemes": dict(Counter(entry.scheme.name for entry in content.linears.values() if entry.scheme)),
        "quantized_linears": len(content.linears),
        "quantized_weights": weights,
        "bits_per_quantized_weight": _bits(sum(linear_bytes.values()), weights),
        "grid_bits_per_quantized_weight": _bits(sum(e.stored_bytes for e in content.linears.values()), weights),
        "bf16_linears": len(content.bf16_names),
        "other_tensors": len(dense),
        "weight_bytes": stored,
        "bf16_bytes": 2 * weights + sum(2 * spec.num_bytes // spec.dtype.itemsize for spec in dense.values()),
        "linears": _linears(content, linear_bytes, progress or (lambda done, total: None)),
    }


def _bits(num_bytes: float, weights: int) -> float | None:
    return round(8 * num_bytes / weights, 4) if weights else None


def _linears(content: ModelContent, linear_bytes: Mapping[str, int], progress: Progress) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    done, total = 0, sum(entry.out_features * entry.in_features for entry in content.linears.values())
    for name, entry in content.linears.items():
        found.append(_linear(entry, content.quantized[name], linear_bytes[name]))
        done += entry.out_features * entry.in_features
        progress(done, total)
    return found


def _linear(entry: PlanEntry, tensor: QuantizedTensor, num_bytes: int) -> dict[str, Any]:
    scheme, scale = tensor.scheme, tensor.scale.float()
    clipped = int(torch.count_nonzero((tensor.codes == scheme.qmin) | (tensor.codes == scheme.qmax)))
    return {
        "name": entry.name,
        "out_features": entry.out_features,
        "in_features": entry.in_features,
        "scheme": scheme.name,
        "bits": scheme.num_bits,
        "group_size": scheme.group_size,
        "bytes": num_bytes,
        "scale_min": float(scale.abs().min()),
        "scale_max": float(scale.abs().max()),
        "negative": int((scale < 0).sum()) / scale.numel(),
        "clipped": clipped / tensor.codes.numel(),
    }
