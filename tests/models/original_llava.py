"""Small checkpoints in the original LLaVA-1.5 layout, written from a random Transformers model by a mapping of their
own: the code under test is not asked for a name."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB, IMAGE_ID, PAD_ID, GROWN_VOCAB = 100, 100, 101, 128
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "mm_hidden_size": 48,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/toy-clip",
    "image_aspect_ratio": "pad",
    "use_mm_proj": True,
}


def toy_tokenizer() -> Any:
    """A Llama tokenizer of ``VOCAB`` tokens: printable ASCII, the newline byte and one merge."""
    from transformers import LlamaTokenizer

    letters = string.ascii_letters + string.digits + string.punctuation
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", *letters, "▁t"]
    assert len(tokens) == VOCAB
    vocab = {token: number for number, token in enumerate(tokens)}
    return LlamaTokenizer(vocab=vocab, merges=[("▁", "t")], pad_token="<unk>", model_max_length=512)


def toy_model(seed: int = 0, **config: Any) -> Any:
    """A random FP32 model of Transformers; its vocabulary has already grown as the conversion will grow it."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        initializer_factor=3.0,
    )
    text = LlamaConfig(
        vocab_size=GROWN_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        initializer_range=0.2,
        pad_token_id=PAD_ID,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, **{"image_token_index": IMAGE_ID} | config)
    )
    with torch.no_grad():
        # Biases and norms are born as zeros and ones, which would hide a mixed-up pair.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def original_tensors(model: Any, tower: bool) -> dict[str, torch.Tensor]:
    """The tensors of ``model`` under the names, and with the vocabulary, of the original."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            name = "model.vision_tower.vision_tower.vision_model." + name.split("model.vision_tower.")[1]
            if not tower:
                continue
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "mm_projector.2").replace("language_model.", "")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[:VOCAB]
        found[name] = tensor.clone().contiguous()
    return found


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_original(folder: Path, model: Any, *, tower: bool = False, shards: int = 1, **config: Any) -> Path:
    """Write ``model`` under ``folder`` in the original layout, ``tower`` inside or not; returns ``folder``."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    write_tensors(folder, original_tensors(model, tower), shards)
    toy_tokenizer().save_pretrained(folder)
    return folder


def write_tower(folder: Path, model: Any) -> Path:
    """The tower of ``model`` as a CLIP vision folder."""
    model.model.vision_tower.save_pretrained(folder)
    return folder
