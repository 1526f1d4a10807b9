"""A model's configuration as the values of the two GGUF headers, under the keys that llama.cpp reads.

Transformers reads ``config.json`` first, so that older files (flat ones of Qwen2-VL, ``rope_theta`` outside of
``rope_parameters``) and missing keys come out as what the model would be built with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.strict_json import read_object, shown
from grace_vlm.errors import FormatError
from grace_vlm.formats.gguf_file import BF16, Q4_0, Kind, Value
from grace_vlm.formats.gguf_names import LLAVA, QWEN3, Architecture

MAX_VOCABULARY, _MAX_LAYERS = 1 << 20, 1 << 12
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "BF16": 32}
_QWEN2_IMAGE_SIZE = 560
"""What llama.cpp writes for a tower without learned positions; it only sizes a first buffer."""
_LLAVA_EPS, _QWEN_EPS = "layer_norm_eps", 1e-6
_MOST = 3.4e38


def parsed_config(config: dict[str, Any]) -> Any:
    """``config.json`` as Transformers' own class; ``FormatError`` if that does not take it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    refusals = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    own = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(config["model_type"], **own)
    except (*refusals, ImportError, AssertionError) as error:
        # All lines: the first of a validation error is "Validation error for field ...:", the reason comes after it.
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
        raise FormatError(f"config.json is not one that Transformers reads: {reason}") from error


def _whole(section: Any, key: str, most: int = 1 << 30) -> int:
    """A positive number of a configuration; ``FormatError`` for anything else, before something is made as large."""
    value = getattr(section, key, None)
    if type(value) is not int or not 1 <= value <= most:
        raise FormatError(f"config.json has {key} = {shown(value)}; gguf needs a whole number from 1 to {most:,}")
    return value


def _number(key: str, value: Any) -> float:
    """A finite number above 0 of a configuration; ``FormatError`` for anything else."""
    if type(value) not in (int, float) or not 0 < value <= _MOST:
        raise FormatError(f"config.json has {key} = {shown(value)}; gguf needs a number above 0 that FP32 holds")
    return float(value)


def _whole_list(key: str, value: Any, length: int | None = None) -> list[int]:
    """A list of whole numbers from 0, of ``length``; ``FormatError`` for anything else."""
    is_list = isinstance(value, list | tuple) and all(type(item) is int and 0 <= item < 1 << 31 for item in value)
    if not is_list or (length is not None and len(value) != length):
        needed = f"{length} whole numbers" if length else "whole numbers"
        raise FormatError(f"config.json has {key} = {shown(value)}; gguf needs a list of {needed}")
    return list(value)


def _head_dim(text: Any) -> int:
    if getattr(text, "head_dim", None):
        return _whole(text, "head_dim")
    return _whole(text, "hidden_size") // _whole(text, "num_attention_heads")


def _sections(rope: Mapping[str, Any], head_dim: int) -> list[int]:
    """How many frequencies time, height and width have; together half a head."""
    found = _whole_list("mrope_section", rope.get("mrope_section"), 3)
    if 2 * sum(found) != head_dim:
        raise FormatError(f"config.json has mrope_section = {found}; gguf needs a sum of {head_dim // 2}, half a head")
    return [*found, 0]


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
        raise FormatError(f"gguf is written for plain rotary embeddings; this model's are {shown(rope['rope_type'])}")
    if getattr(text, "use_sliding_window", False):
        raise FormatError("gguf is written for full attention; this model has use_sliding_window")
    heads, head_dim = _whole(text, "num_attention_heads"), _head_dim(text)
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
        f"{name}.attention.layer_norm_rms_epsilon": _number("rms_norm_eps", text.rms_norm_eps),
        f"{name}.rope.freq_base": _number("rope_theta", rope.get("rope_theta")),
        f"{name}.rope.dimension_count": head_dim,
    }
    if architecture is not LLAVA:
        values[f"{name}.rope.dimension_sections"] = list(_sections(rope, head_dim))
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
        "clip.use_gelu": str(vision.hidden_act).startswith("gelu"),
        "clip.use_silu": vision.hidden_act == "silu",
        f"{key}.projection_dim": _whole(config.get_text_config(), "hidden_size"),
        f"{key}.patch_size": _whole(vision, "patch_size"),
        f"{key}.embedding_length": _whole(vision, _width_key(vision)),
        f"{key}.block_count": layers,
        f"{key}.attention.head_count": _whole(vision, "num_attention_heads" if is_llava else "num_heads"),
        f"{key}.attention.layer_norm_epsilon": _number(_LLAVA_EPS, getattr(vision, _LLAVA_EPS, _QWEN_EPS)),
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
        values[f"{key}.n_wa_pattern"] = _window_pattern(_whole_list("fullatt_block_indexes", whole))
        values[f"{key}.window_size"] = _whole(vision, "window_size")
    return values


def _width_key(vision: Any) -> str:
    """What the tower's width is called: Qwen2-VL's ``hidden_size`` is the decoder's."""
    return "embed_dim" if hasattr(vision, "embed_dim") else "hidden_size"


def _feed_forward(vision: Any) -> int:
    if getattr(vision, "intermediate_size", None) is not None:
        return _whole(vision, "intermediate_size")
    return int(_whole(vision, "embed_dim") * _number("mlp_ratio", vision.mlp_ratio))


def _image_size(vision: Any) -> int:
    if getattr(vision, "num_position_embeddings", None) is not None:
        return math.isqrt(_whole(vision, "num_position_embeddings")) * _whole(vision, "patch_size")
    return _whole(vision, "image_size") if hasattr(vision, "image_size") else _QWEN2_IMAGE_SIZE


def _feature_layers(config: Any, num_layers: int) -> list[int]:
    """Hidden states that go to the projector, counted from the embeddings, as llama.cpp counts them."""
    stated = config.vision_feature_layer
    if type(stated) is not int or config.vision_feature_select_strategy != "default":
        raise FormatError(
            f"gguf is written for LLaVA with one feature layer and strategy 'default', not {shown(stated)} and "
            f"{shown(config.vision_feature_select_strategy)}"
        )
    counted = stated if stated >= 0 else num_layers + stated + 1
    if not 0 <= counted <= num_layers:
        raise FormatError(f"config.json has vision_feature_layer = {shown(stated)}; the tower has {num_layers} layers")
    return [counted]


def _deepstack(vision: Any) -> list[int]:
    return _whole_list("deepstack_visual_indexes", vision.deepstack_visual_indexes)


def _pixel_values(pixels: dict[str, Any], key: str) -> list[float]:
    found: Any = pixels.get(key)
    is_list = isinstance(found, list) and len(found) == 3 and all(type(value) in (int, float) for value in found)
    if not is_list or not all(abs(value) <= _MOST for value in found):
        raise FormatError(f"the image processor has {key} = {shown(found)}; gguf needs a list of 3 numbers")
    return [float(value) for value in found]


def _window_pattern(whole: Sequence[int]) -> int:
    """Every how many layers of the tower attention is whole."""
    pattern = whole[0] + 1
    if any(after - before != pattern for before, after in pairwise(whole)):
        stated = shown(list(whole))
        raise FormatError(f"gguf needs whole attention at equal distances; fullatt_block_indexes is {stated}")
    return pattern


Size = tuple[str, int] | None
"""(setting of ``config.json``, what it says) of an axis; None for one that no setting says."""


def _text_sizes(text: Any) -> dict[str, tuple[Size, ...]]:
    """What the axes of each tensor of ``model.gguf`` must be; a bias has the first."""
    head_dim, heads, kv_heads = _head_dim(text), *(_whole(text, f"num_{x}_heads") for x in ("attention", "key_value"))
    width, inner = ((key, _whole(text, key)) for key in ("hidden_size", "intermediate_size"))
    queries = ("num_attention_heads x head_dim", heads * head_dim)
    keys = ("num_key_value_heads x head_dim", kv_heads * head_dim)
    table = (("vocab_size", _whole(text, "vocab_size")), width)
    blocks: dict[str, tuple[Size, ...]] = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
        **dict.fromkeys(("attn_norm", "ffn_norm"), (width,)),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (("head_dim", head_dim),)),
    }
    ends: dict[str, tuple[Size, ...]] = {"token_embd": table, "output": table, "output_norm": (width,)}
    return ends | {f"blk.N.{name}": sizes for name, sizes in blocks.items()}


def _vision_sizes(config: Any, is_llava: bool) -> dict[str, tuple[Size, ...]]:
    """The same for ``mmproj.gguf``."""
    vision, out = config.vision_config, ("hidden_size", _whole(config.get_text_config(), "hidden_size"))
    width_key, inner = f"vision_config.{_width_key(vision)}", ("the tower's intermediate size", _feed_forward(vision))
    num = _whole(vision, _width_key(vision))
    width, patch = (width_key, num), ("vision_config.patch_size", _whole(vision, "patch_size"))
    merged = num if is_llava else num * _whole(vision, "spatial_merge_size") ** 2
    places = (_image_size(vision) // patch[1]) ** 2 + is_llava
    square: tuple[Size, ...] = (width, width)
    blocks = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), square),
        "attn_qkv": ((f"3 x {width_key}", 3 * num), width),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (inner, width)),
        "ffn_down": (width, inner),
    }
    return {
        "v.patch_embd": (width, None, patch, patch),
        "v.position_embd": (("the number of places for the tower's image size", places), width),
        "mm.0": (None, ("the projector's input", merged)),
        "mm.2": (out, None),
        **{f"v.blk.N.{name}": sizes for name, sizes in blocks.items()},
    }


def _counts(config: Any, architecture: Architecture) -> Iterator[tuple[str, int, str]]:
    """(setting, how many it says, pattern of the tensors that are numbered from 0)."""
    text, vision = config.get_text_config(), config.vision_config
    yield "num_hidden_layers", _whole(text, "num_hidden_layers", _MAX_LAYERS), r"blk\.([0-9]+)\."
    depth = "num_hidden_layers" if architecture is LLAVA else "depth"
    yield f"vision_config.{depth}", _whole(vision, depth, _MAX_LAYERS), r"v\.blk\.([0-9]+)\."


def require_agreement(config: Any, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """``FormatError`` if a configuration states other sizes than the tensors have.

    Args:
        config: of Transformers. shapes: of all tensors of both files, by their names there.
    """
    do = "put the config.json of these weights beside them"
    for key, stated, pattern in _counts(config, architecture):
        found = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
        if found != set(range(stated)):
            layers = shown(sorted(found))
            raise FormatError(f"config.json has {key} = {stated}, the weights have the layers {layers}; {do}")
    if architecture is QWEN3:
        marked = _deepstack(config.vision_config)
        mergers = {name.split(".")[2] for name in shapes if name.startswith("v.deepstack.")}
        if len(marked) != len(mergers):
            what = f"{len(marked)} deepstack_visual_indexes, the weights {len(mergers)} mergers"
            raise FormatError(f"config.json has {what}; {do}")
    sizes = _text_sizes(config.get_text_config()) | _vision_sizes(config, architecture is LLAVA)
    for name, shape in shapes.items():
        tensor = re.sub(r"blk\.[0-9]+", "blk.N", name).rpartition(".")[0]
        for size, length in zip(sizes.get(tensor, ()), shape, strict=False):
            if size is not None and size[1] != length:
                raise FormatError(f"config.json says {size[0]} = {size[1]}, {name} has shape {list(shape)}; {do}")
