"""A model's configuration as the values of the two GGUF headers, under the keys that llama.cpp reads.

Transformers reads ``config.json`` first, so that older files (flat ones of Qwen2-VL, ``rope_theta`` outside of
``rope_parameters``) and missing keys come out as what the model would be built with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import FormatError
from grace_vlm.formats.gguf_file import BF16, Q4_0, Kind, Value
from grace_vlm.formats.gguf_names import LLAVA, QWEN3, Architecture

MAX_VOCABULARY, _MAX_LAYERS = 1 << 20, 1 << 12
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "BF16": 32}
_QWEN2_IMAGE_SIZE = 560
"""What llama.cpp writes for a tower without learned positions; it only sizes a first buffer."""
_LLAVA_EPS, _QWEN_EPS = "layer_norm_eps", 1e-6


def parsed_config(config: dict[str, Any]) -> Any:
    """``config.json`` as Transformers' own class; ``FormatError`` if that does not take it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    refusals = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    own = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(config["model_type"], **own)
    except (*refusals, ImportError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"config.json is not one that Transformers reads: {reason}") from error


def _whole(section: Any, key: str, most: int = 1 << 30) -> int:
    """A positive number of a configuration; ``FormatError`` for anything else, before something is made as large."""
    value = getattr(section, key, None)
    if type(value) is not int or not 1 <= value <= most:
        raise FormatError(f"config.json has {key} = {value!r}; gguf needs a whole number from 1 to {most:,}")
    return value


def _numbers(where: str, key: str, value: Any, length: int | None = None) -> list[Any]:
    """A list of numbers, of ``length``; ``FormatError`` for anything else."""
    is_list = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
    if not is_list or (length is not None and len(value) != length):
        raise FormatError(f"{where} has {key} = {value!r}; gguf needs a list of {length or 'whole'} numbers")
    return list(value)


def _file_type(kinds: Sequence[Kind]) -> int:
    """Of the most frequent kind, as llama.cpp counts it; BF16 for a model without a grid."""
    return _FILE_TYPES[max(kinds, key=lambda kind: (kinds.count(kind), kind == Q4_0)).name if kinds else BF16.name]


def text_values(config: Any, architecture: Architecture, kinds: Sequence[Kind]) -> dict[str, Value]:
    """Values of ``model.gguf`` but the tokenizer's.

    Args:
        config: of Transformers. kinds: of the quantized linears.

    Raises:
        FormatError: a kind of rotary embedding or attention that llama.cpp's architecture does not have.
    """
    text, name = config.get_text_config(), architecture.name
    rope = text.rope_parameters if isinstance(text.rope_parameters, dict) else {}
    if rope.get("rope_type", "default") != "default":
        raise FormatError(f"gguf is written for plain rotary embeddings; this model's are {rope['rope_type']!r}")
    if getattr(text, "use_sliding_window", False):
        raise FormatError("gguf is written for full attention; this model has use_sliding_window")
    heads = _whole(text, "num_attention_heads")
    head_dim = _whole(text, "head_dim") if getattr(text, "head_dim", None) else _whole(text, "hidden_size") // heads
    theta = rope.get("rope_theta")
    if not isinstance(theta, int | float):
        raise FormatError(f"config.json has rope_theta = {theta!r}; gguf needs a number")
    values: dict[str, Value] = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": config.model_type,
        "general.file_type": _file_type(kinds),
        "general.quantization_version": 2,
        f"{name}.vocab_size": _whole(text, "vocab_size", MAX_VOCABULARY),
        f"{name}.block_count": _whole(text, "num_hidden_layers", _MAX_LAYERS),
        f"{name}.context_length": _whole(text, "max_position_embeddings"),
        f"{name}.embedding_length": _whole(text, "hidden_size"),
        f"{name}.feed_forward_length": _whole(text, "intermediate_size"),
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": _whole(text, "num_key_value_heads"),
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        f"{name}.rope.freq_base": float(theta),
        f"{name}.rope.dimension_count": head_dim,
    }
    if architecture is not LLAVA:
        values[f"{name}.rope.dimension_sections"] = [
            *_numbers("config.json", "mrope_section", rope.get("mrope_section"), 3),
            0,
        ]
    if architecture is QWEN3:
        values[f"{name}.n_deepstack_layers"] = len(_deepstack(config.vision_config))
    return values


def _pixels(folder: Path) -> dict[str, Any]:
    """The image processor's settings: a file of their own, or a section of the processor's."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_object(folder / name, FormatError)
            found = found.get("image_processor", found)
            if isinstance(found, dict) and "image_mean" in found:
                return found
    raise FormatError(
        "gguf carries the picture's mean and deviation, and there is no preprocessor_config.json with them"
    )


def vision_values(config: Any, architecture: Architecture, projector: str, folder: Path) -> dict[str, Value]:
    """Values of ``mmproj.gguf``.

    Args:
        config: of Transformers. projector: llama.cpp's type of it. folder: has the processor's files.
    """
    vision, pixels = config.vision_config, _pixels(folder)
    is_llava = architecture is LLAVA
    layers = _whole(vision, "num_hidden_layers" if is_llava else "depth", _MAX_LAYERS)
    key = "clip.vision"
    values: dict[str, Value] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": config.model_type,
        "general.file_type": _FILE_TYPES[BF16.name],
        "clip.has_vision_encoder": True,
        "clip.projector_type": projector,
        "clip.use_gelu": vision.hidden_act.startswith("gelu"),
        "clip.use_silu": vision.hidden_act == "silu",
        f"{key}.projection_dim": _whole(config.get_text_config(), "hidden_size"),
        f"{key}.patch_size": _whole(vision, "patch_size"),
        f"{key}.embedding_length": _whole(vision, "embed_dim" if hasattr(vision, "embed_dim") else "hidden_size"),
        f"{key}.block_count": layers,
        f"{key}.attention.head_count": _whole(vision, "num_attention_heads" if is_llava else "num_heads"),
        f"{key}.attention.layer_norm_epsilon": float(getattr(vision, _LLAVA_EPS, _QWEN_EPS)),
        f"{key}.feed_forward_length": _feed_forward(vision),
        f"{key}.image_size": _image_size(vision),
        f"{key}.image_mean": _pixel_values(pixels, "image_mean"),
        f"{key}.image_std": _pixel_values(pixels, "image_std"),
    }
    if is_llava:
        return values | {"clip.has_llava_projector": True, f"{key}.feature_layer": _feature_layers(config, layers)}
    values[f"{key}.spatial_merge_size"] = _whole(vision, "spatial_merge_size")
    if architecture is QWEN3:
        marked = set(_deepstack(vision))
        values[f"{key}.is_deepstack_layers"] = [layer in marked for layer in range(layers)]
    if whole := getattr(vision, "fullatt_block_indexes", None):
        values[f"{key}.n_wa_pattern"] = _window_pattern(_numbers("config.json", "fullatt_block_indexes", whole))
        values[f"{key}.window_size"] = _whole(vision, "window_size")
    return values


def _feed_forward(vision: Any) -> int:
    if getattr(vision, "intermediate_size", None) is not None:
        return _whole(vision, "intermediate_size")
    return int(_whole(vision, "embed_dim") * vision.mlp_ratio)


def _image_size(vision: Any) -> int:
    if getattr(vision, "num_position_embeddings", None) is not None:
        return math.isqrt(_whole(vision, "num_position_embeddings")) * _whole(vision, "patch_size")
    return _whole(vision, "image_size") if hasattr(vision, "image_size") else _QWEN2_IMAGE_SIZE


def _feature_layers(config: Any, num_layers: int) -> list[int]:
    """Hidden states that go to the projector, counted from the embeddings, as llama.cpp counts them."""
    stated = config.vision_feature_layer
    if type(stated) is not int or config.vision_feature_select_strategy != "default":
        raise FormatError(
            f"gguf is written for LLaVA with one feature layer and strategy 'default', not {stated!r} and "
            f"{config.vision_feature_select_strategy!r}"
        )
    return [stated if stated >= 0 else num_layers + stated + 1]


def _deepstack(vision: Any) -> list[int]:
    return _numbers("config.json", "deepstack_visual_indexes", vision.deepstack_visual_indexes)


def _pixel_values(pixels: dict[str, Any], key: str) -> list[float]:
    return [float(value) for value in _numbers("the image processor", key, pixels.get(key), 3)]


def _window_pattern(whole: Sequence[int]) -> int:
    """Every how many layers of the tower attention is whole."""
    pattern = whole[0] + 1
    if any(after - before != pattern for before, after in pairwise(whole)):
        raise FormatError(f"gguf needs whole attention at equal distances; fullatt_block_indexes is {list(whole)}")
    return pattern
