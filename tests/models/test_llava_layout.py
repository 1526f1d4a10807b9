"""The original LLaVA-1.5 layout against the Transformers model that its fake checkpoints were written from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_llava import (
    CONFIG,
    GROWN_VOCAB,
    IMAGE_ID,
    PAD_ID,
    VOCAB,
    original_tensors,
    toy_model,
    toy_tokenizer,
    write_original,
    write_tensors,
    write_tower,
)
from PIL import Image

from grace_vlm.errors import ConfigError
from grace_vlm.models.llava_layout import (
    LLAVA_CHAT_TEMPLATE,
    convert_config,
    is_original_llava,
    module_name,
    open_original_llava,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
PATCHES = 16
TENSORS = 25
"""Two layers of nine, two embeddings, the last norm, and two layers of projector."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def reference() -> Any:
    return toy_model()


@pytest.fixture
def folder(tmp_path: Path, reference: Any) -> Path:
    """A checkpoint with its tower beside it."""
    write_tower(tmp_path / "toy-clip", reference)
    return write_original(tmp_path / "llava", reference)


def picture(width: int = 40, height: int = 20) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def question(text: str = "what is this?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def batch(processor: Any, **kinds: Any) -> dict[str, Any]:
    text = processor.apply_chat_template(question(), add_generation_prompt=True)
    return dict(processor(images=picture(), text=text, return_tensors="pt").items()) | kinds


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits


def error_of(folder: Path, vision_tower: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        open_original_llava(folder, torch.float32, vision_tower)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    write_tensors(folder, tensors)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_logits_of_text_and_picture_are_the_models_own(tmp_path: Path, reference: Any, shards: int) -> None:
    write_tower(tmp_path / "toy-clip", reference)
    folder = write_original(tmp_path / "llava", reference, shards=shards)
    model, processor = open_original_llava(folder, torch.float32)
    assert not model.training
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta or tensor.dtype != torch.float32]
    inputs = batch(processor)
    assert torch.equal(logits(model, inputs)[..., :VOCAB], logits(reference, inputs)[..., :VOCAB])
    # The picture matters: without this the tower could be anything.
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    assert not torch.allclose(logits(model, inputs), logits(model, other))


def test_every_tensor_is_the_one_that_was_written(folder: Path, reference: Any) -> None:
    model, _ = open_original_llava(folder, torch.float32)
    expected, found = reference.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        rows = VOCAB if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else None
        assert torch.equal(tensor[:rows], expected[name][:rows]), name


def test_new_rows_are_the_mean_and_never_win(folder: Path) -> None:
    model, processor = open_original_llava(folder, torch.float32)
    for weight in (model.lm_head.weight, model.model.language_model.embed_tokens.weight):
        assert weight.shape == (GROWN_VOCAB, 64)
        torch.testing.assert_close(weight[VOCAB:], weight[:VOCAB].mean(0).expand(GROWN_VOCAB - VOCAB, -1))
    found = logits(model, batch(processor))
    assert (found[..., VOCAB:].amax(-1) < found[..., :VOCAB].amax(-1)).all()


def test_the_model_is_bf16_unless_told_otherwise(folder: Path, reference: Any) -> None:
    model, processor = open_original_llava(folder)
    assert model.config.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
    norm = "model.language_model.norm.weight"
    assert torch.equal(model.get_parameter(norm), reference.get_parameter(norm).bfloat16())
    inputs = batch(processor)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert torch.isfinite(logits(model, inputs)).all()


def test_the_model_does_not_hang_on_its_files(folder: Path) -> None:
    model, _ = open_original_llava(folder, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for file in [folder / "model.safetensors", folder.parent / "toy-clip" / "model.safetensors"]:
        size = file.stat().st_size
        with file.open("r+b") as raw:
            raw.seek(size // 2)
            raw.write(b"\xff" * (size // 2))
    assert not [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


@pytest.mark.parametrize("name", ["absolute", "beside", "inside", "sibling"])
def test_the_tower_is_found_where_the_checkpoint_says(tmp_path: Path, reference: Any, name: str) -> None:
    folder = tmp_path / "run" / "llava"
    place, said = {
        "absolute": (tmp_path / "far" / "clip", str(tmp_path / "far" / "clip")),
        "beside": (tmp_path / "run" / "towers" / "clip", "towers/clip"),
        "inside": (folder / "clip", "./clip"),
        "sibling": (tmp_path / "run" / "clip", "openai/clip"),
    }[name]
    write_original(folder, reference, mm_vision_tower=said)
    write_tower(place, reference)
    model, processor = open_original_llava(folder, torch.float32)
    inputs = batch(processor)
    assert torch.equal(logits(model, inputs)[..., :VOCAB], logits(reference, inputs)[..., :VOCAB])


def test_the_tower_that_is_given_wins(tmp_path: Path, folder: Path) -> None:
    other = toy_model(seed=5)
    model, _ = open_original_llava(folder, torch.float32, str(write_tower(tmp_path / "other", other)))
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, other.model.vision_tower.state_dict()[name]), name


def test_the_tower_of_a_whole_clip_folder(tmp_path: Path, folder: Path, reference: Any) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=reference.config.vision_config.to_dict(), text_config=text))
    clip.vision_model.load_state_dict(reference.model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "whole")
    model, processor = open_original_llava(folder, torch.float32, str(tmp_path / "whole"))
    inputs = batch(processor)
    assert torch.equal(logits(model, inputs)[..., :VOCAB], logits(reference, inputs)[..., :VOCAB])


def test_a_tower_in_the_checkpoint_is_used(tmp_path: Path, reference: Any) -> None:
    """A tower that was trained along: the folder beside it gives sizes only."""
    write_tower(tmp_path / "toy-clip", toy_model(seed=5))
    folder = write_original(tmp_path / "llava", reference, tower=True)
    model, processor = open_original_llava(folder, torch.float32)
    inputs = batch(processor)
    assert torch.equal(logits(model, inputs)[..., :VOCAB], logits(reference, inputs)[..., :VOCAB])


def test_the_sizes_of_openais_tower_are_known(tmp_path: Path, reference: Any) -> None:
    """With its weights in the checkpoint nothing else is needed; the toy's are too small, which is what is said."""
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    folder = write_original(tmp_path / "llava", reference, tower=True, **config)
    # 25 and a tower of 24 layers of 16, the class token, the patches, the positions and two norms.
    assert f"{folder} lacks 336 of {TENSORS + 391} tensors: " in error_of(folder)


def test_saved_and_opened_by_transformers_alone_it_is_the_same(tmp_path: Path, folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = open_original_llava(folder, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(model)
    assert again.dtype == torch.float32
    inputs, inputs_again = batch(processor), batch(AutoProcessor.from_pretrained(tmp_path / "saved"))
    assert inputs["input_ids"].tolist() == inputs_again["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], inputs_again["pixel_values"])
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_the_processor_makes_as_many_tokens_as_there_are_patches(folder: Path) -> None:
    model, processor = open_original_llava(folder, torch.float32)
    inputs = batch(processor)
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_token_id == 1
    assert ids.count(1) == 1
    assert ids.count(IMAGE_ID) == PATCHES == model.config.image_seq_length
    start = ids.index(IMAGE_ID)
    assert ids[start : start + PATCHES] == [IMAGE_ID] * PATCHES
    assert ids[start + PATCHES] == processor.tokenizer.convert_tokens_to_ids("<0x0A>")
    assert processor.tokenizer.pad_token_id == PAD_ID == model.config.text_config.pad_token_id
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, len(ids) + 3) or generated[0, -1] == 2


def test_class_tokens_are_kept_when_the_projector_was_trained_on_them(tmp_path: Path) -> None:
    reference = toy_model(vision_feature_select_strategy="full", vision_feature_layer=-1)
    write_tower(tmp_path / "toy-clip", reference)
    config = {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}
    model, processor = open_original_llava(write_original(tmp_path / "llava", reference, **config), torch.float32)
    inputs = batch(processor)
    assert inputs["input_ids"].eq(IMAGE_ID).sum() == PATCHES + 1 == model.config.image_seq_length
    assert torch.equal(logits(model, inputs)[..., :VOCAB], logits(reference, inputs)[..., :VOCAB])


@pytest.mark.parametrize(("aspect", "padded"), [("pad", True), ("square", False), (None, False)])
def test_pictures_are_padded_to_a_square_if_the_training_did(
    tmp_path: Path, reference: Any, aspect: str | None, padded: bool
) -> None:
    write_tower(tmp_path / "toy-clip", reference)
    folder = write_original(tmp_path / "llava", reference, image_aspect_ratio=aspect)
    _, processor = open_original_llava(folder, torch.float32)
    assert processor.image_processor.do_pad is padded
    pixels = processor.image_processor(Image.new("RGB", (56, 28), "white"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    white = torch.tensor((1 - mean) / std, dtype=torch.float32)
    corner, middle = pixels[0, :, 0, 0], pixels[0, :, 14, 14]
    torch.testing.assert_close(middle, white)
    # The original pads with CLIP's mean colour, which normalizes to (nearly) nothing.
    assert bool((corner.abs() < 0.02).all()) is padded
    assert padded or torch.equal(corner, middle)


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_the_towers_own_picture_preparation_is_used(folder: Path, aspect: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"image_aspect_ratio": aspect}))
    stored = {"size": 28, "crop_size": 28, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    stored |= {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "do_resize": True}
    (folder.parent / "toy-clip" / "preprocessor_config.json").write_text(json.dumps(stored))
    _, processor = open_original_llava(folder, torch.float32)
    used = processor.image_processor
    assert (*used.image_mean, *used.image_std, used.resample) == (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 2)
    assert used.do_pad is (aspect == "pad")
    assert batch(processor)["pixel_values"].shape == (1, 3, 28, 28)


def test_two_turns_are_written_as_in_training(folder: Path) -> None:
    _, processor = open_original_llava(folder, torch.float32)
    assert processor.chat_template == LLAVA_CHAT_TEMPLATE
    turns = [
        *question("Is it red?"),
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "blue?"}]},
    ]
    expected = SYSTEM + "USER: <image>\nIs it red? ASSISTANT: No.</s>USER: And blue? "
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == expected + "ASSISTANT:"
    turns.append({"role": "assistant", "content": "Yes."})
    assert processor.apply_chat_template(turns) == expected + "ASSISTANT: Yes.</s>"


def test_parts_are_written_in_their_order_and_a_system_text_replaces_the_default(folder: Path) -> None:
    _, processor = open_original_llava(folder, torch.float32)
    parts = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": "and "},
        {"type": "image"},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert processor.apply_chat_template(messages) == "Be brief. USER: Compare <image>\nand <image>\n "
    for wrong in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}):
        with pytest.raises(Exception, match=r"LLaVA-1\.5 (knows the roles|takes image and text)"):
            processor.apply_chat_template([wrong])


def test_a_vocabulary_with_room_is_kept(tmp_path: Path, reference: Any) -> None:
    """The tokenizer already has ``<image>``: its trained row stays, and nothing grows (110 is no multiple of 64)."""
    write_tower(tmp_path / "toy-clip", reference)
    folder = write_original(tmp_path / "llava", reference, vocab_size=110)
    tensors = original_tensors(reference, tower=False)
    tensors["model.embed_tokens.weight"] = reference.model.language_model.embed_tokens.weight[:110].detach().clone()
    tensors["lm_head.weight"] = reference.lm_head.weight[:110].detach().clone()
    rewrite(folder, tensors)
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<im_patch>", "<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, processor = open_original_llava(folder, torch.float32)
    assert model.config.image_token_id == 101
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id == 102
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.language_model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    assert batch(processor)["input_ids"].eq(101).sum() == PATCHES


@pytest.mark.parametrize("stored", [True, False])
def test_a_head_that_is_tied_is_the_embedding_unless_one_is_stored(
    tmp_path: Path, reference: Any, stored: bool
) -> None:
    write_tower(tmp_path / "toy-clip", reference)
    folder = write_original(tmp_path / "llava", reference, tie_word_embeddings=True)
    tensors = original_tensors(reference, tower=False)
    if not stored:
        del tensors["lm_head.weight"]
    rewrite(folder, tensors)
    model, _ = open_original_llava(folder, torch.float32)
    embedding = model.model.language_model.embed_tokens.weight
    assert (model.lm_head.weight is embedding) is not stored
    expected = reference.lm_head.weight if stored else reference.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:VOCAB], expected[:VOCAB])


def test_tables_that_old_checkpoints_carry_are_ignored(folder: Path, reference: Any) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    rewrite(folder, original_tensors(reference, tower=True) | old)
    model, processor = open_original_llava(folder, torch.float32)
    inputs = batch(processor)
    assert torch.equal(logits(model, inputs)[..., :VOCAB], logits(reference, inputs)[..., :VOCAB])


def test_missing_tensors_are_named(folder: Path, reference: Any) -> None:
    tensors = original_tensors(reference, tower=False)
    del tensors["model.mm_projector.2.bias"]
    rewrite(folder, tensors)
    assert error_of(folder) == f"{folder} lacks 1 of 25 tensors: model.mm_projector.2.bias; copy it again"
    rewrite(folder, {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.1.mlp")})
    assert error_of(folder) == (
        f"{folder} lacks 4 of 25 tensors: model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight, "
        "model.layers.1.mlp.up_proj.weight, ...; copy it again"
    )


def test_unexpected_tensors_are_named(folder: Path, reference: Any) -> None:
    rewrite(folder, original_tensors(reference, tower=False) | {"model.image_newline": torch.ones(64)})
    assert error_of(folder) == (f"{folder} holds 1 tensors beside LLaVA-1.5's 25: model.image_newline; remove them")


def test_wrong_shapes_are_named(folder: Path, reference: Any) -> None:
    tensors = original_tensors(reference, tower=False)
    tensors["model.mm_projector.0.weight"] = torch.ones(64, 32)
    tensors["lm_head.weight"] = torch.ones(GROWN_VOCAB, 64)
    rewrite(folder, tensors)
    assert error_of(folder) == (
        f"{folder} has 2 tensors that do not fit its config.json: lm_head.weight [128, 64], expected [100, 64], "
        "model.mm_projector.0.weight [64, 32], expected [64, 48]"
    )


def test_an_unbaked_checkpoint_is_not_opened(folder: Path, reference: Any) -> None:
    scale = {"model.layers.0.self_attn.q_proj.log_scale": torch.ones(64, 1)}
    rewrite(folder, original_tensors(reference, tower=False) | scale)
    assert error_of(folder) == (
        f"{folder} is an unbaked training checkpoint, with 1 learned scales "
        "(model.layers.0.self_attn.q_proj.log_scale); expected plain weights: bake the scales into them first"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mm_projector_type", "linear", "'mlp2x_gelu'"),
        ("mm_projector_type", "mlp3x_gelu", "'mlp2x_gelu'"),
        ("mm_use_im_start_end", True, "False"),
        ("mm_use_im_patch_token", True, "False"),
        ("mm_vision_select_feature", "cls", "'patch' or 'cls_patch'"),
        ("mm_patch_merge_type", "spatial_unpad", "'flat'"),
        ("image_aspect_ratio", "anyres", "'pad' or 'square'"),
        ("s2", True, "False"),
    ],
)
def test_what_transformers_llava_cannot_hold_is_refused(folder: Path, key: str, value: Any, expected: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    assert error_of(folder) == f"{key} is {value!r}: Transformers' LLaVA cannot hold it; expected {expected}"


def test_a_projector_without_a_type_is_the_linear_one(folder: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "mm_projector_type"}
    (folder / "config.json").write_text(json.dumps(config))
    assert error_of(folder) == (
        "mm_projector_type is 'linear': Transformers' LLaVA cannot hold it; expected 'mlp2x_gelu'"
    )


def test_a_tower_that_cannot_be_had_is_an_error(folder: Path) -> None:
    for name in ("openai/nothing", str(folder / "nothing")):
        assert error_of(folder, name) == (
            f"{folder} needs the vision tower {name!r}, which is no CLIP model in a folder or on the hub; "
            "give one as vision_tower=FOLDER"
        )
    (folder / "config.json").write_text(json.dumps(CONFIG | {"mm_vision_tower": None}))
    assert error_of(folder) == f"{folder} names no vision tower (mm_vision_tower); give one as vision_tower=FOLDER"


def test_a_tower_with_holes_is_an_error(folder: Path, reference: Any) -> None:
    tower = folder.parent / "toy-clip"
    tensors = reference.model.vision_tower.state_dict()
    del tensors["post_layernorm.bias"]
    rewrite(tower, tensors)
    assert re.fullmatch(
        r"vision tower 'openai/toy-clip' lacks 1 tensors of a CLIP tower: (vision_model\.)?post_layernorm\.bias",
        error_of(folder),
    )


def test_a_tower_of_another_width_does_not_fit_the_projector(tmp_path: Path, folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=7)).save_pretrained(tmp_path / "narrow")
    assert error_of(folder, str(tmp_path / "narrow")) == (
        f"{folder} has 1 tensors that do not fit its config.json: "
        "model.mm_projector.0.weight [64, 48], expected [64, 32]"
    )


def test_files_that_are_not_what_they_should_be(folder: Path, reference: Any) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"no")
    assert error_of(folder) == f"{weights} is missing or no safetensors file; copy the folder again"
    weights.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    assert error_of(folder) == f"{weights} is missing or no safetensors file; convert the .bin files to safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../a.safetensors"}}))
    assert error_of(folder) == (
        f"{index} names a shard '../a.safetensors'; expected a bare file name like model.safetensors"
    )
    index.write_text("[]")
    assert error_of(folder) == f"{index} cannot be read; expected a JSON object"
    write_tensors(folder, original_tensors(reference, tower=False), shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    first = min(list(original_tensors(reference, tower=False))[::2])
    assert error_of(folder) == f"{folder} holds {first} in two shards; expected every tensor once"


def test_a_folder_without_tokenizer_or_configuration(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert error_of(folder) == f"{folder} has no tokenizer; expected its tokenizer.json or tokenizer.model"
    (folder / "tokenizer.model").write_bytes(b"no")
    assert error_of(folder) == (
        f"the tokenizer of {folder} cannot be opened; a tokenizer.model needs pip install sentencepiece protobuf"
    )
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "llava", "text_config": {}}))
    assert error_of(folder) == (
        f"{folder} is no original LLaVA checkpoint; expected model_type 'llava_llama' in config.json"
    )
    config.unlink()
    assert error_of(folder) == f"{config} cannot be read; expected a JSON object"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llava_llama"}, True),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, True),
        ({"model_type": "llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "x"}, True),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mm_vision_tower": "x"}, False),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, False),
        ({"model_type": "llava_mpt", "architectures": ["LlavaMPTForCausalLM"], "mm_vision_tower": "x"}, False),
        ({"model_type": "llava", "architectures": None}, False),
        ({"model_type": "llava", "architectures": 5}, False),
        ({"model_type": "llava", "architectures": "LlavaLlamaForCausalLM"}, False),
        ({}, False),
    ],
)
def test_the_layout_is_known_by_its_configuration(config: dict[str, Any], expected: bool) -> None:
    assert is_original_llava(config) is expected


def test_the_configuration_of_the_7b_model() -> None:
    """The numbers of liuhaotian/llava-v1.5-7b, and those of its llava-hf conversion."""
    from transformers import LlavaConfig

    original = CONFIG | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "mm_hidden_size": 1024,
    }
    converted = convert_config(original, LlavaConfig().vision_config)
    assert (converted.image_token_id, converted.pad_token_id, converted.text_config.vocab_size) == (32000, 32001, 32064)
    assert converted.image_seq_length == 576
    assert (converted.vision_feature_layer, converted.vision_feature_select_strategy) == (-2, "default")
    assert converted.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert converted.text_config.max_position_embeddings == 4096
    assert converted.vision_config.patch_size == 14
    scaled = convert_config(original | {"rope_scaling": {"type": "linear", "factor": 4.0}}, converted.vision_config)
    assert scaled.text_config.rope_parameters["rope_type"] == "linear"
    assert scaled.text_config.rope_parameters["factor"] == 4.0


def test_a_configuration_without_the_flat_keys_is_an_error(reference: Any) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "hidden_size"}
    with pytest.raises(ConfigError) as caught:
        convert_config(config, reference.config.vision_config)
    assert str(caught.value) == (
        "config.json has no whole number hidden_size; expected the flat keys of LLaVA-1.5's layout"
    )


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "model.language_model.layers.3.self_attn.q_proj"),
        ("model.layers.11.mlp.up_proj.weight", "model.language_model.layers.11.mlp.up_proj.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("model.embed_tokens", "model.language_model.embed_tokens"),
        ("lm_head", "lm_head"),
        ("model.mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        ),
    ],
)
def test_names_are_translated(original: str, expected: str) -> None:
    assert module_name(original) == expected


@pytest.mark.parametrize("original", ["model.mm_projector.4.weight", "model.normal", "lm_head_2", "", "layers.0"])
def test_other_names_are_refused(original: str) -> None:
    with pytest.raises(ConfigError) as caught:
        module_name(original)
    assert str(caught.value) == (
        f"{original!r} is no name of the original LLaVA layout; expected one below model.embed_tokens, model.layers, "
        "model.norm, lm_head, model.mm_projector.0, model.mm_projector.2, model.vision_tower.vision_tower.vision_model"
    )
