"""Open a model folder, a run folder or a hub id with Transformers' own classes, in the precision we compute in.

Weights are read in BF16. On a CPU they are then widened to FP32: BF16 products are eight times slower there, and the
values stay BF16's. No code from a checkpoint is ever run (``trust_remote_code`` is never set).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import Adapter
from grace_vlm.models.fp8 import to_fp8
from grace_vlm.models.hub import CONFIG, PROCESSOR, WEIGHTS, require_on_hub
from grace_vlm.models.known import CLIP_L_336, KNOWN
from grace_vlm.models.llava_layout import convert_config, is_original_llava, open_original_llava
from grace_vlm.models.registry import adapter_for

Precision = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it."""

    model: Any
    processor: Any
    adapter: Adapter
    path: str


def end_ids(loaded: LoadedModel) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's own and those of the generation configuration, which may be a list."""
    stated = (loaded.processor.tokenizer.eos_token_id, loaded.model.generation_config.eos_token_id)
    ids = [own for one in stated for own in (one if isinstance(one, list | tuple) else [one])]
    return frozenset(int(one) for one in ids if one is not None)


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one; a device that is not there is a ``ConfigError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"device {name!r} is none that we compute on; expected auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for and no GPU is usable; use device=cpu (see grace doctor)")
    device, num_gpus = torch.device(name), torch.cuda.device_count()
    if device.index is not None and device.index >= num_gpus:
        raise ConfigError(f"device {name!r} was asked for and there are {num_gpus} GPUs here, cuda:0 the first")
    return device


def use_device(name: str) -> torch.device:
    """``pick_device``, made the current one: events and Triton's launches go there, whatever their tensors are on."""
    device = pick_device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here means a model on the hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "runs/", "assets/"))


def resolve_source(path: str) -> str:
    """A run folder stands for its ``final/``; a hub id (org/name) stays; anything else must be a model folder."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    if folder.exists():
        raise ConfigError(f"{path} is no model folder: it has no config.json (a run folder has final/config.json)")
    if is_hub_id(path):
        return path
    raise ConfigError(f"{path} does not exist; expected a model folder, a run folder or a hub id like org/name")


def _read_config(source: str) -> dict[str, Any]:
    """config.json of a folder or a hub id as it stands: Transformers need not know its model type."""
    from transformers import PreTrainedConfig

    require_on_hub(source, CONFIG)
    try:
        content: dict[str, Any] = PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError) as error:
        raise _not_opened(source, error) from error
    return content


def is_original(path: str) -> bool:
    """Whether a model is in the original LLaVA layout; ``ConfigError`` if there is none."""
    return (path not in KNOWN or Path(path).exists()) and is_original_llava(_read_config(resolve_source(path)))


def describe_config(path: str) -> Any:
    """A model's configuration: of a published one from ``known.py``, else of a folder or from the hub.

    Raises:
        ConfigError: no model there.
    """
    from transformers import AutoConfig, CLIPVisionConfig

    if path in KNOWN and not Path(path).exists():
        stated = copy.deepcopy(KNOWN[path])
        return AutoConfig.for_model(stated.pop("model_type"), **stated)
    source = resolve_source(path)
    stated = _read_config(source)
    try:
        if is_original_llava(stated):
            return convert_config(stated, CLIPVisionConfig(**CLIP_L_336))
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _not_opened(source, error) from error


def describe_model(path: str) -> tuple[Any, Adapter]:
    """A model without weights, on the meta device, from its configuration alone, and its adapter.

    Raises:
        ConfigError: no model there, or no adapter for it.
    """
    return meta_model(describe_config(path))


def meta_model(config: Any) -> tuple[Any, Adapter]:
    """A model of ``config`` on the meta device, and its adapter."""
    from transformers import AutoModelForImageTextToText

    adapter = adapter_for(config.model_type)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return model, adapter


def load_processor(path: str) -> Any:
    """The processor of a model folder, run folder or hub id."""
    from transformers import AutoProcessor

    source = resolve_source(path)
    require_on_hub(source, PROCESSOR)
    try:
        return AutoProcessor.from_pretrained(source)
    except OSError as error:
        raise _not_opened(source, error) from error


Cut = Callable[[Any, torch.device], None]
"""Given a model on the host, moves a part of it to the device itself; the rest follows whole."""


def load_model(
    path: str,
    device: str = "auto",
    vision_tower: str | None = None,
    precision: Precision = "bf16",
    cut: Cut | None = None,
) -> LoadedModel:
    """Open a model for training or evaluation.

    A checkpoint in the original LLaVA layout is converted as it is read; ``vision_tower`` then says where its CLIP
    tower is, if it is not where its configuration says. With ``precision`` fp8 decoder and tower are rounded before
    they reach the device (``fp8.py``), for a teacher; ``cut`` then takes what it likes.

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
    if is_original_llava(_read_config(source)):
        converted, processor = open_original_llava(_local_folder(source), torch.bfloat16, vision_tower)
        return LoadedModel(placed(converted, target, precision, cut), processor, adapter_for("llava"), source)
    require_on_hub(source, WEIGHTS)
    try:
        config = AutoConfig.from_pretrained(source)
        adapter = adapter_for(config.model_type)
        with warnings.catch_warnings():
            # Transformers warns that our dequantize=True joins the folder's own quantization_config: the point of it.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            opened: Any = AutoModelForImageTextToText.from_pretrained(
                source, dtype=torch.bfloat16, output_loading_info=True, **_dequantize_options(config, source)
            )
            model, report = opened
    except (OSError, ValueError, ImportError) as error:  # ImportError: a layout's own package is not installed
        raise _not_opened(source, error) from error
    if missing := sorted(report["missing_keys"]):
        # Transformers starts what is missing at random and warns; such a model must not be trained or scored.
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(f"{source} lacks {len(missing)} tensors of its model: {shown}; fetch it again")
    return LoadedModel(placed(model, target, precision, cut), load_processor(source), adapter, source)


def _local_folder(source: str) -> Path:
    """The folder itself, or the hub's files for an id, fetched."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source))
    except OSError as error:
        raise _not_opened(source, error) from error


def placed(model: Any, device: torch.device, precision: Precision, cut: Cut | None = None) -> Any:
    """On its device, in what we compute in there, for evaluation."""
    if precision == "fp8":
        to_fp8(model, adapter_for(model.config.model_type))
    if device.type == "cpu":
        model = model.float()
    if cut is not None:
        cut(model, device)
    return model.to(device).eval()


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


def _not_opened(source: str, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return ConfigError(f"{source} cannot be opened as a model: {reason}")
