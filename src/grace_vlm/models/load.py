"""Open a model folder, a run folder or a hub id with Transformers' own classes, in the precision we compute in.

Weights are read in BF16. On a CPU they are then widened to FP32: BF16 products are eight times slower there, and the
values stay BF16's. No code from a checkpoint is ever run (``trust_remote_code`` is never set).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import Adapter
from grace_vlm.models.registry import adapter_for


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it."""

    model: Any
    processor: Any
    adapter: Adapter
    path: str


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one; a device that is not there is a ``ConfigError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for and no GPU is usable; use device=cpu (see grace doctor)")
    return torch.device(name)


def resolve_source(path: str) -> str:
    """A run folder stands for its ``final/``; a hub id (org/name) stays; anything else must be a model folder."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    if folder.exists():
        raise ConfigError(f"{path} is no model folder: it has no config.json (a run folder has final/config.json)")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith((".", "runs/", "assets/")):
        return path
    raise ConfigError(f"{path} does not exist; expected a model folder, a run folder or a hub id like org/name")


def load_processor(path: str) -> Any:
    """The processor of a model folder, run folder or hub id."""
    from transformers import AutoProcessor

    source = resolve_source(path)
    try:
        return AutoProcessor.from_pretrained(source)
    except OSError as error:
        raise _not_opened(source, error) from error


def load_model(path: str, device: str = "auto") -> LoadedModel:
    """Open a model for training or evaluation.

    A packed checkpoint (compressed-tensors) is opened by stock Transformers and dequantized at load; its weights are
    then the baked ones, value for value.

    Raises:
        ConfigError: no model there, no adapter for it, no such device, or a packed folder of mixed schemes.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = resolve_source(path)
    target = pick_device(device)
    try:
        config = AutoConfig.from_pretrained(source)
        adapter = adapter_for(config.model_type)
        with warnings.catch_warnings():
            # Transformers warns that our dequantize=True joins the folder's own quantization_config: the point of it.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model: Any = AutoModelForImageTextToText.from_pretrained(
                source, dtype=torch.bfloat16, **_dequantize_options(config, source)
            )
    except OSError as error:
        raise _not_opened(source, error) from error
    if target.type == "cpu":
        model = model.float()
    return LoadedModel(model.to(target).eval(), load_processor(source), adapter, source)


def _dequantize_options(config: Any, source: str) -> dict[str, Any]:
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return {}
    from transformers import CompressedTensorsConfig

    groups = stored.get("config_groups", {}) if isinstance(stored, dict) else {}
    if len(groups) > 1:
        # Transformers 5.23 decodes every layer by the first group's scheme when it dequantizes at load.
        raise ConfigError(f"{source} packs {len(groups)} schemes in one folder; open the unpacked model folder instead")
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def _not_opened(source: str, error: OSError) -> ConfigError:
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return ConfigError(f"{source} cannot be opened as a model: {reason}")
