"""Which teacher, tokens and pictures a cache was made of, and whether a recipe means the same.

    {"format_version": 1, "hidden": "exact", "head": [V, d], "made_of": {...}}         CACHE/cache.json

``made_of`` names what a run must share: the teacher (its name, and a digest of its weights), the family, the tokens,
how pictures become pixels, the tapped layer and the kind of gate. Entries are found by the content of a row, so a row
with other tokens or pixels would be missed anyway; this says why before the first step, in one line.

A run opens no teacher. Where its recipe names one all the same, it must be the cache's: by its weights where they are
known without reading them (a folder with a manifest of ours, a model made from a seed), else by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from grace_vlm.checkpoint.atomic import write_json_atomic
from grace_vlm.checkpoint.manifest import MANIFEST, sha256_file
from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import CheckpointError, ConfigError
from grace_vlm.models.load import LoadedModel, is_hub_id, pick_device, resolve_source
from grace_vlm.models.random_start import PREFIX as RANDOM
from grace_vlm.models.tokenizers import token_fingerprint
from grace_vlm.train.config import Recipe
from grace_vlm.train.open import TOY

FORMAT_VERSION = 1
FILE = "cache.json"
Hidden = Literal["exact", "bf16", "fp8"]
"""How hidden states are kept: as the teacher computes them, in BF16, or in E4M3 with one FP32 scale a token."""
HIDDEN: tuple[Hidden, ...] = ("exact", "bf16", "fp8")
_OF_PIXELS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_pad", "patch_size", "temporal_patch_size", "merge_size",
)  # fmt: skip
"""What an image processor makes pixels by; its other settings are names."""


@dataclass(frozen=True)
class CacheInfo:
    """``cache.json``. ``head``: shape of the teacher's head (V_t, d_t)."""

    hidden: Hidden
    head: tuple[int, int]
    made_of: dict[str, Any]


def read_info(root: Path) -> CacheInfo:
    """What a cache is; ``CheckpointError`` if it is none."""
    if not (root / FILE).is_file():
        raise CheckpointError(
            f"{root} is no cache of a teacher (no {FILE}); make it with grace teacher cache RECIPE --out {root}"
        )
    content = read_object(root / FILE)
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{root} has format_version {version!r}; this grace reads {FORMAT_VERSION}: make it anew")
    if set(content) != set(CacheInfo.__dataclass_fields__) or content["hidden"] not in HIDDEN:
        raise CheckpointError(f"{root / FILE} is not what grace teacher cache writes; make the cache anew")
    return CacheInfo(content["hidden"], tuple(content["head"]), content["made_of"])


def write_info(root: Path, info: CacheInfo) -> None:
    """Publish ``cache.json``."""
    write_json_atomic(root / FILE, {"format_version": FORMAT_VERSION, **asdict(info)})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    """sha256 of a file; a file of the hub's cache is named by it already."""
    target = path.resolve()
    return target.name if re.fullmatch("[0-9a-f]{64}", target.name) else sha256_file(path)


def _made_weights(recipe: Recipe, name: str) -> str | None:
    """What decides the weights of a ``toy:`` or ``random:`` name."""
    if not name.startswith((TOY, RANDOM)):
        return None
    device = pick_device(recipe.runtime.device).type if name.startswith(RANDOM) else "cpu"
    return f"{name} of seed {recipe.runtime.seed + 1} on {device}, torch {torch.__version__}"


def known_weights(recipe: Recipe, name: str) -> str | None:
    """The digest of a teacher's weights where it takes no reading of them, else None."""
    if made := _made_weights(recipe, name):
        return made
    source = Path(name) if (Path(name) / "config.json").is_file() else Path(name) / "final"
    if not (source / MANIFEST).is_file():
        return None
    files = read_object(source / MANIFEST).get("files", {})
    return _digest({file: entry["sha256"] for file, entry in files.items() if _is_weights(file)})


def _is_weights(file: str) -> bool:
    return file == "config.json" or (file.endswith(".safetensors") and "/" not in file)


def weights_of(recipe: Recipe, name: str) -> str:
    """The digest of a teacher's weights: of the sha256 of its safetensors files and its configuration, which are read
    where nothing says them."""
    if (known := known_weights(recipe, name)) is not None:
        return known
    source = resolve_source(name)
    folder = Path(source)
    if is_hub_id(source) and not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "config.json"]))
    files = sorted(path for path in folder.iterdir() if _is_weights(path.name))
    return _digest({path.name: _file_digest(path) for path in files})


def _seen_by(recipe: Recipe, student: LoadedModel, pixels: torch.dtype) -> dict[str, Any]:
    """What a cache and a run share beside the teacher; ``pixels``: their dtype, that of the tower."""
    settings = {name: getattr(student.processor.image_processor, name, None) for name in _OF_PIXELS}
    return {
        "family": student.adapter.model_type,
        "tokens": token_fingerprint(student.processor.tokenizer)[:16],
        "image processor": _digest({name: _plain(value) for name, value in settings.items()}),
        "dtype of pixels": str(pixels).removeprefix("torch."),
        "data.min_pixels": recipe.data.min_pixels,
        "data.max_pixels": recipe.data.max_pixels,
        "loss.relational_layer": recipe.loss.relational_layer,
        "gate": _gate_of(recipe),
    }


def _gate_of(recipe: Recipe) -> str:
    loss = recipe.loss
    kind = "official" if loss.implementation == "official" else "FP32"
    is_published = loss.gate_signal == "entropy" and loss.gate_temperature == 1
    return kind if is_published else f"{kind}, {loss.gate_signal}^(1/{loss.gate_temperature!r})"


def _plain(value: Any) -> Any:
    """A setting as JSON: sizes are mappings of one class or another."""
    return {k: v for k, v in dict(value).items() if v is not None} if hasattr(value, "keys") else value


def made_of(recipe: Recipe, student: LoadedModel, pixels: torch.dtype) -> dict[str, Any]:
    """What a cache of this recipe is made of; arguments as in ``_seen_by``."""
    name = str(recipe.model.teacher)
    return {
        "teacher": name,
        "weights": weights_of(recipe, name),
        "model.teacher_precision": recipe.model.teacher_precision,
        **_seen_by(recipe, student, pixels),
    }


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What of ``expected`` is something else in ``found``."""
    return "; ".join(
        f"{key} is {expected[key]} here and {found.get(key)} there"
        for key in expected
        if found.get(key) != expected[key]
    )


def require_same_cache(root: Path, info: CacheInfo, expected: CacheInfo) -> None:
    """``ConfigError`` if a build would go on with a cache of something else."""
    ours = {"--hidden": expected.hidden, **expected.made_of}
    if differing := _differences({"--hidden": info.hidden, **info.made_of}, ours):
        raise ConfigError(f"{root} is a cache of something else: {differing}; choose another --out, or delete it")


def require_made_for(root: Path, info: CacheInfo, recipe: Recipe, student: LoadedModel) -> None:
    """``ConfigError`` if a run cannot use a cache: what it would use of it is not what the recipe means."""
    objective = recipe.objective()
    expected = _seen_by(recipe, student, next(student.model.parameters()).dtype)
    if not objective.is_relational:
        del expected["loss.relational_layer"]
    if not objective.is_gated:
        del expected["gate"]
    if (name := recipe.model.teacher) is not None:
        weights = known_weights(recipe, name)
        expected |= {"teacher": name} if weights is None else {"weights": weights}
        expected["model.teacher_precision"] = recipe.model.teacher_precision
    if differing := _differences(info.made_of, expected):
        raise ConfigError(
            f"{root} (model.teacher_cache) is the cache of something else: {differing}; "
            "change the recipe, or make a cache of it with grace teacher cache RECIPE --out FOLDER"
        )
