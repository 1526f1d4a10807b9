"""The toy factory writes what stock Transformers opens, and the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_world import TEXTS, World, picture

from grace_vlm.errors import ConfigError
from grace_vlm.models.load import load_model, pick_device, resolve_source
from grace_vlm.models.toy import SPECIAL_TOKENS, TOY_SIZES, build_toy_model, build_toy_processor


def test_what_auto_classes_open_is_the_real_thing(world: World) -> None:
    assert type(world.model).__name__ == "Qwen3VLForConditionalGeneration"
    assert type(world.processor).__name__ == "Qwen3VLProcessor"
    assert type(world.model).__module__.startswith("transformers.")


def test_the_reopened_model_has_the_weights_that_were_built(world: World) -> None:
    built = build_toy_model("student", world.processor, seed=3)
    with torch.no_grad():
        built.model.language_model.embed_tokens.weight.mul_(20)
    own = dict(world.model.named_parameters())
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter, own[name]), name
    other = build_toy_model("student", world.processor, seed=4)
    assert not torch.equal(other.model.visual.patch_embed.proj.weight, own["model.visual.patch_embed.proj.weight"])


def test_building_a_model_leaves_the_random_state_alone(world: World) -> None:
    before = torch.get_rng_state()
    build_toy_model("tiny", world.processor, seed=9)
    assert torch.equal(torch.get_rng_state(), before)


def test_special_tokens_are_single_ids_and_survive_saving(world: World) -> None:
    tokenizer = world.processor.tokenizer
    for token in SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert world.model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= world.model.config.text_config.vocab_size


def test_the_tokenizer_is_lossless_on_any_text(world: World) -> None:
    tokenizer = world.processor.tokenizer
    for text in ("what shape?", "Ünïcödé 漢字 🙂\n\ttabs", "a  b   c", "1234567890"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_same_texts_give_the_same_tokenizer(world: World) -> None:
    again = build_toy_processor(TEXTS * 4, vocab_size=384)
    assert again.tokenizer.get_vocab() == world.processor.tokenizer.get_vocab()
    sample = "is there a blue triangle in the picture?"
    assert again.tokenizer(sample)["input_ids"] == world.processor.tokenizer(sample)["input_ids"]


@pytest.mark.parametrize(("width", "height"), [(20, 20), (64, 64), (128, 128), (200, 90), (600, 600)])
def test_a_picture_has_between_16_and_64_visual_tokens(world: World, width: int, height: int) -> None:
    grid = world.processor.image_processor(images=[picture(width, height, 0)], return_tensors="pt")["image_grid_thw"]
    tokens = int(grid.prod()) // 4
    assert 16 <= tokens <= 64


@pytest.mark.parametrize("size", sorted(TOY_SIZES))
def test_widths_divide_by_128_and_the_head_is_tied(world: World, size: str) -> None:
    model = build_toy_model(size, world.processor)
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == 0, name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_teacher_is_deeper_and_wider() -> None:
    teacher, student = TOY_SIZES["teacher"], TOY_SIZES["student"]
    assert teacher.layers > student.layers
    assert teacher.hidden > student.hidden


def test_an_unknown_size_is_an_error(world: World) -> None:
    with pytest.raises(ConfigError) as caught:
        build_toy_model("huge", world.processor)
    assert (
        str(caught.value)
        == "unknown toy size 'huge'; expected one of student, teacher, tiny, qwen2_vl, qwen2_5_vl, llava"
    )


def test_load_model_widens_bf16_values_on_a_cpu(toy_folder: Path) -> None:
    loaded = load_model(str(toy_folder), "cpu")
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, parameter.bfloat16().float()), name
    assert not loaded.model.training


def test_paths_that_are_no_model_are_errors(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        resolve_source(str(run))
    assert str(caught.value) == f"{run} is no model folder: it has no config.json (a run folder has final/config.json)"
    (run / "final" / "config.json").write_text("{}")
    assert resolve_source(str(run)) == str(run / "final")
    for path in (str(tmp_path / "nothing"), "runs/nothing", "nothing"):
        with pytest.raises(ConfigError) as caught:
            resolve_source(path)
        assert str(caught.value) == (
            f"{path} does not exist; expected a model folder, a run folder or a hub id like org/name"
        )
    assert resolve_source("Qwen/Qwen3-VL-2B-Instruct") == "Qwen/Qwen3-VL-2B-Instruct"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device("cuda:1")
    assert str(caught.value) == "device 'cuda:1' was asked for and no GPU is usable; use device=cpu (see grace doctor)"
    assert pick_device("auto").type == "cpu"


def test_what_is_no_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpu", "meta", "cuda:", "cuda:-1", ""):
        with pytest.raises(ConfigError) as caught:
            pick_device(name)
        assert str(caught.value) == f"device {name!r} is none that we compute on; expected auto, cpu, cuda or cuda:N"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError) as caught:
        pick_device("cuda:2")
    assert str(caught.value) == "device 'cuda:2' was asked for and there are 2 GPUs here, cuda:0 the first"
