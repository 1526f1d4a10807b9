"""A model and its codes, from a path: what the engine is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from grace_vlm.formats.lazy import Lazy
from grace_vlm.formats.registry import read_model
from grace_vlm.models.adapter import stored_name
from grace_vlm.models.load import LoadedModel, is_original, load_model
from grace_vlm.quant.scheme import QuantizedTensor


def open_model(path: str, device: str = "auto") -> tuple[LoadedModel, Mapping[str, QuantizedTensor]]:
    """A model as ``load_model`` opens it, and (codes, scale) of its quantized linears by module name, read when they
    are asked for; none of a hub id or the original LLaVA layout."""
    loaded = load_model(path, device)
    folder = Path(loaded.path)
    if not folder.is_dir() or is_original(path):
        return loaded, {}
    content = read_model(folder)
    stored = {name: stored_name(loaded.adapter, name) for name, _ in loaded.model.named_modules()}
    own = {name: theirs for name, theirs in stored.items() if theirs in content.quantized}
    return loaded, Lazy(own, lambda name: content.quantized[own[name]])
