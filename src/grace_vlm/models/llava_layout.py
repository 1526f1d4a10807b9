"""LLaVA-1.5 as its authors publish it (haotian-liu/LLaVA), opened as Transformers' own LLaVA.

The original is a Llama with a projector hung into it and a CLIP tower that is only named; a tower trained along lies
in the checkpoint. The original code cuts the prompt at ``<image>`` and puts the picture there; Transformers needs a
token. As in the llava-hf conversion, ``<image>`` and ``<pad>`` follow the last token, and the vocabulary grows to a
multiple of 64 (32000 -> 32064). Every new row of embedding and head is the mean of the old rows: a new token's logit is
the mean of the old logits, so that (up to rounding) it never wins. Nothing is guessed: a tensor too many, too few or of
another shape is an error in the checkpoint's own names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from grace_vlm.errors import ConfigError
from grace_vlm.models.hub import CONFIG, PROCESSOR, WEIGHTS, require_on_hub

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

NAMES = {
    "model.embed_tokens": "model.language_model.embed_tokens",
    "model.layers": "model.language_model.layers",
    "model.norm": "model.language_model.norm",
    "lm_head": "lm_head",
    "model.mm_projector.0": "model.multi_modal_projector.linear_1",
    "model.mm_projector.2": "model.multi_modal_projector.linear_2",
    "model.vision_tower.vision_tower.vision_model": "model.vision_tower",
}
"""Original prefix -> Transformers' (5.17 and 5.23 agree). What follows the prefix is the same in both."""

LLAVA_CHAT_TEMPLATE = (
    "{% macro render(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part.type == 'image' %}{{ '<image>\\n' }}{% elif part.type == 'text' %}{{ part.text }}{% else %}"
    "{{ raise_exception('LLaVA-1.5 takes image and text parts only') }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% if messages[0].role != 'system' %}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}{% if message.role == 'system' %}{{ render(message.content) + ' ' }}"
    "{% elif message.role == 'user' %}{{ 'USER: ' + render(message.content) + ' ' }}"
    "{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + render(message.content) + '</s>' }}"
    "{% else %}{{ raise_exception('LLaVA-1.5 knows the roles system, user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""``conv_vicuna_v1`` of the original code, with which LLaVA-1.5 was trained; a system message replaces its own."""

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL: tuple[str, ...] = ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta")
_OPTIONAL += ("rope_scaling", "max_position_embeddings", "attention_bias", "mlp_bias", "tie_word_embeddings")
_OPTIONAL += ("bos_token_id", "eos_token_id")
# What Transformers' LLaVA can hold of the original's choices; an absent or null key is the original's default.
_HELD: dict[str, tuple[Any, ...]] = dict.fromkeys(("mm_use_im_start_end", "mm_use_im_patch_token", "s2"), (False,))
_HELD |= {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch", "cls_patch")}
_HELD |= {"image_aspect_ratio": ("pad", "square"), "mm_patch_merge_type": ("flat",)}
GROWN = ("model.embed_tokens.weight", "lm_head.weight")
IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")


def is_original_llava(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the original layout (``LlavaLlamaForCausalLM``), not Transformers' own."""
    kind, classes = config.get("model_type"), config.get("architectures")
    original = isinstance(classes, list) and "LlavaLlamaForCausalLM" in classes
    return kind == "llava_llama" or (original and (kind == "llava" or "mm_vision_tower" in config))


def convert_config(
    config: Mapping[str, Any], vision_config: CLIPVisionConfig, image_id: int | None = None, pad_id: int | None = None
) -> LlavaConfig:
    """Transformers' configuration for an original one; the token ids are ``vocab_size`` and the next unless given.

    Raises:
        ConfigError: what Transformers' LLaVA cannot hold, or a missing key.
    """
    from transformers import LlamaConfig, LlavaConfig

    for key, held in _HELD.items():
        value = config.get(key) or ("linear" if key == "mm_projector_type" else None)
        if value and value not in held:
            expected = f"Transformers' LLaVA cannot hold it; expected {' or '.join(map(repr, held))}"
            raise ConfigError(f"{key} is {value!r}: {expected}")
    if lacking := [key for key in _REQUIRED if not isinstance(config.get(key), int)]:
        raise ConfigError(f"config.json has no whole number {lacking[0]}; expected the flat keys of LLaVA-1.5's layout")
    vision: Any = vision_config
    vocab = config["vocab_size"]
    image, pad = vocab if image_id is None else image_id, vocab + 1 if pad_id is None else pad_id
    if max(image, pad) >= vocab:
        vocab = (max(image, pad) // 64 + 1) * 64
    text = {key: config[key] for key in (*_REQUIRED, *_OPTIONAL) if config.get(key) is not None}
    with_cls = config.get("mm_vision_select_feature") == "cls_patch"
    made = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text | {"vocab_size": vocab, "pad_token_id": pad}),
        image_token_index=image,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + with_cls,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if with_cls else "default",
    )
    made.pad_token_id = pad
    return made


def module_name(original: str) -> str:
    """Transformers' name of an original tensor or module; ``ConfigError`` for a name not of the original layout."""
    if found := _moved(original, NAMES):
        return found
    raise ConfigError(f"{original!r} is no name of the original LLaVA layout; expected one below {', '.join(NAMES)}")


def _moved(name: str, prefixes: Mapping[str, str]) -> str:
    return next((new + name[len(old) :] for old, new in prefixes.items() if f"{name}.".startswith(f"{old}.")), "")


@dataclass(frozen=True)
class OriginalParts:
    """What an original checkpoint has beside its own tensors.

    Args:
        config: Transformers' configuration.
        processor: tokenizer (with ``<image>`` and ``<pad>``) and picture preparation.
        tower: tensors of the vision tower by their names in it; empty if the checkpoint holds them itself.
    """

    config: LlavaConfig
    processor: LlavaProcessor
    tower: dict[str, torch.Tensor]


def open_parts(
    folder: Path,
    config: dict[str, Any],
    names: Collection[str],
    dtype: torch.dtype = torch.bfloat16,
    vision_tower: str | None = None,
) -> OriginalParts:
    """Configuration, processor and vision tower of an original checkpoint whose tensors are called ``names``.

    Raises:
        ConfigError: no tower or tokenizer, or a choice that Transformers' LLaVA cannot hold.
    """
    # A head that lies there is used as it is, also if the configuration calls it tied.
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in names
    inside = any(name.startswith("model.vision_tower.") for name in names)
    name = vision_tower or config.get("mm_vision_tower")
    if not name:
        raise ConfigError(f"{folder} names no vision tower (mm_vision_tower); give one as vision_tower=FOLDER")
    vision_config, tower, source = _open_tower(folder, str(name), inside, dtype)
    tokenizer = _open_tokenizer(folder)
    image_id, pad_id = (int(tokenizer.convert_tokens_to_ids(token)) for token in ("<image>", "<pad>"))
    converted = convert_config(config, vision_config, image_id, pad_id)
    converted.dtype = dtype
    processor = _processor(tokenizer, converted, source, config.get("image_aspect_ratio") == "pad")
    return OriginalParts(converted, processor, tower)


def grow_vocabulary(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Embedding or head (vocabulary, width) with ``rows`` more words, each the mean of the old ones."""
    mean = matrix.mean(dim=0, keepdim=True, dtype=torch.float32).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows, -1)])


def open_original_llava(
    folder: Path, dtype: torch.dtype = torch.bfloat16, vision_tower: str | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model (on the CPU, in ``dtype``, for evaluation) and the processor of an original checkpoint folder.

    ``vision_tower`` (a folder or a hub id) replaces the name in ``config.json``. If the checkpoint holds the tower's
    weights, those are used; the named one then gives sizes and picture preparation only.

    Raises:
        ConfigError: another layout, unreadable or .bin files, no tower, tensors that are not the expected ones.
    """
    from accelerate import init_empty_weights
    from transformers import LlavaForConditionalGeneration

    config = _read_object(folder / "config.json")
    if not is_original_llava(config):
        raise ConfigError(f"{folder} is no original LLaVA checkpoint; expected model_type 'llava_llama' in config.json")
    tensors = _open_tensors(folder)
    parts = open_parts(folder, config, tensors, dtype, vision_tower)
    converted = parts.config
    # Parameters have no memory until they get their tensor; the small tables beside them are real at once.
    with init_empty_weights(include_buffers=False):
        model: Any = LlavaForConditionalGeneration(converted)
    model.config.dtype = dtype
    model.model.vision_tower.load_state_dict(parts.tower, assign=True, strict=bool(parts.tower))
    _fill(model, tensors, folder, config["vocab_size"], dtype)
    model.tie_weights()
    return model.eval(), parts.processor


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read; expected a JSON object") from error


def _open_tensors(folder: Path) -> dict[str, Any]:
    """Tensor name -> the open file that holds it; only headers are read."""
    index = folder / "model.safetensors.index.json"
    weight_map = _read_object(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    found: dict[str, Any] = {}
    for shard in sorted(map(str, set(weight_map.values()) if isinstance(weight_map, dict) else ())):
        if Path(shard).name != shard:
            raise ConfigError(f"{index} names a shard {shard!r}; expected a bare file name like model.safetensors")
        try:
            handle: Any = safe_open(folder / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            todo = "convert the .bin files to safetensors" if any(folder.glob("*.bin")) else "copy the folder again"
            raise ConfigError(f"{folder / shard} is missing or no safetensors file; {todo}") from error
        if twice := found.keys() & handle.keys():
            raise ConfigError(f"{folder} holds {min(twice)} in two shards; expected every tensor once")
        found |= dict.fromkeys(handle.keys(), handle)
    return found


def _open_tower(folder: Path, name: str, inside: bool, dtype: torch.dtype) -> tuple[Any, dict[str, Any], str]:
    """The tower's configuration, its tensors (none if the checkpoint has them ``inside``), and where it is."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig

    places = (Path(name), folder / name, folder.parent / name, folder.parent / Path(name).name)
    source = next((str(place) for place in places if (place / "config.json").is_file()), name)
    if inside and source == "openai/clip-vit-large-patch14-336":
        return LlavaConfig().vision_config, {}, source  # LLaVA's default is this very tower: no need to ask a hub
    try:
        require_on_hub(source, CONFIG if inside else WEIGHTS)
        config = CLIPVisionConfig.from_pretrained(source)
        if inside:
            return config, {}, source
        # Never a pytorch_model.bin: that is a pickle.
        opened: Any = CLIPVisionModel.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        wanted = f"{folder} needs the vision tower {name!r}, which is no CLIP model in a folder or on the hub"
        raise ConfigError(f"{wanted}; give one as vision_tower=FOLDER") from error
    tower, report = opened
    if missing := report["missing_keys"]:
        raise ConfigError(f"vision tower {name!r} lacks {len(missing)} tensors of a CLIP tower: {_few(missing)}")
    return config, {key: tensor.clone() for key, tensor in tower.state_dict().items()}, source


def _few(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _fill(model: Any, tensors: Mapping[str, Any], folder: Path, vocab: int, dtype: torch.dtype) -> None:
    """Give every parameter that is still without memory its tensor, one at a time, cast to ``dtype``."""
    back = {new: old for old, new in NAMES.items()}
    shapes = {_moved(name, back): list(t.shape) for name, t in model.state_dict().items() if t.is_meta}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shapes |= {name: [vocab, *shapes[name][1:]] for name in GROWN if name in shapes}
    names = {name for name in tensors if not IGNORED.search(name)}
    if scales := [name for name in names if name.endswith(".log_scale")]:
        what = f"{folder} is an unbaked training checkpoint, with {len(scales)} learned scales ({_few(scales)})"
        raise ConfigError(f"{what}; expected plain weights: bake the scales into them first")
    if missing := shapes.keys() - names:
        raise ConfigError(f"{folder} lacks {len(missing)} of {len(shapes)} tensors: {_few(missing)}; copy it again")
    if odd := names - shapes.keys():
        raise ConfigError(
            f"{folder} holds {len(odd)} tensors beside LLaVA-1.5's {len(shapes)}: {_few(odd)}; remove them"
        )
    found = {name: tensors[name].get_slice(name).get_shape() for name in names}
    if wrong := [f"{name} {found[name]}, expected {shapes[name]}" for name in names if found[name] != shapes[name]]:
        raise ConfigError(f"{folder} has {len(wrong)} tensors that do not fit its config.json: {_few(wrong)}")
    rows = model.config.text_config.vocab_size - vocab
    for name in shapes:
        # A copy, always: what safetensors hands out is the mapped file itself.
        tensor = tensors[name].get_tensor(name).to(dtype, copy=True)
        if name in GROWN:
            tensor = grow_vocabulary(tensor, rows)
        owner, _, leaf = module_name(name).rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))


def _open_tokenizer(folder: Path) -> Any:
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, LlamaConfig

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ConfigError(f"{folder} has no tokenizer; expected its tokenizer.json or tokenizer.model")
    try:
        # Transformers does not know the folder's model_type, and forgets <s>, which every LLaVA prompt starts with.
        # After <image> only a "legacy" tokenizer gives the space token that the original's cut gives there.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig(), add_bos_token=True)
    except (OSError, ValueError, ImportError) as error:
        advice = "a tokenizer.model needs pip install sentencepiece protobuf"
        raise ConfigError(f"the tokenizer of {folder} cannot be opened; {advice}") from error
    image, pad = (AddedToken(token, special=True, normalized=False) for token in ("<image>", "<pad>"))
    tokenizer.add_tokens([image], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def _processor(tokenizer: Any, config: Any, source: str, pad: bool) -> LlavaProcessor:
    from transformers import LlavaImageProcessor, LlavaProcessor

    side = config.vision_config.image_size
    try:
        require_on_hub(source, PROCESSOR)
        image_processor: Any = LlavaImageProcessor.from_pretrained(source, do_pad=pad)
    except (
        ConfigError,
        OSError,
    ):
        # It brings none: CLIP's published values, which are the class's own but for the size.
        image_processor = LlavaImageProcessor(size=side, crop_size={"height": side, "width": side}, do_pad=pad)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, which "default" then takes off again
        chat_template=LLAVA_CHAT_TEMPLATE,
    )
