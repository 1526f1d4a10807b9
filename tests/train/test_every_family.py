"""Every family through the whole loop at toy width: trained, published, opened by stock Transformers, packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_run import recipe_tree, write_rows

from grace_vlm.engine.llm import LLM
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.formats.pack import pack
from grace_vlm.formats.verify import verify
from grace_vlm.models.load import load_model
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import Run, train
from grace_vlm.train.record import read_metrics

SIZES = ("tiny", "qwen2_vl", "qwen2_5_vl", "llava")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_rows(folder, 40)
    return folder


def recipe(folder: Path, size: str, **overrides: Any) -> Recipe:
    tree = recipe_tree(folder, runtime__checkpoint_every_steps=0, runtime__tower_cache_gib=0, **overrides)
    tree["model"] = {"student": f"toy:{size}", "teacher": f"toy:{size}"}
    return recipe_from(tree, "test")


@pytest.mark.parametrize("size", SIZES)
def test_twenty_steps_of_grace(rows: Path, tmp_path: Path, size: str) -> None:
    """The loss falls, scales move, frozen parts are bit-identical, the merger or projector moves."""
    run = Run(recipe(rows, size, optim__num_steps=20, data__packing=True, loss__adaptive=False), tmp_path / "run")
    model, frozen = run.student.model, run.student.adapter.frozen
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reports = [run.stepper.run(step, [run.loader.next() for _ in range(2)]) for step in range(20)]
    first, last = (sum(r.cross_entropy + (r.distillation or 0) for r in part) for part in (reports[:4], reports[-4:]))
    assert last < 0.9 * first
    assert run.masters.scale_drift() > 1e-3
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert not any(name.startswith(frozen) for name in moved)
    assert sum(name.startswith(frozen) for name in before) > 10
    carriers = [name for name in before if ("merger" in name or "projector" in name) and before[name].ndim == 2]
    assert {name for name in carriers if not name.startswith(frozen)} <= moved


@pytest.mark.parametrize("size", SIZES)
def test_what_is_published_opens_in_stock_transformers_and_packs(rows: Path, tmp_path: Path, size: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig

    final = train(recipe(rows, size, optim__num_steps=2), tmp_path / "run")
    processor: Any = AutoProcessor.from_pretrained(final)
    image = Image.open(rows / "images" / "0.png")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the square?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    baked: Any = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.bfloat16).float()
    with torch.no_grad():
        expected = baked(**inputs).logits
    answer = processor.tokenizer.decode(
        baked.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :],
        skip_special_tokens=True,
    )
    llm, params = LLM(str(final), "cpu"), SamplingParams(max_tokens=5)
    assert llm.generate("what color is the square?", rows / "images" / "0.png", params)[0].text == answer
    assert verify(final, final).equal
    packed = pack(final, tmp_path / "packed", "compressed-tensors")
    assert verify(final, packed).equal
    options: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    opened: Any = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.bfloat16, **options).float()
    with torch.no_grad():
        assert float((opened(**inputs).logits - expected).abs().max()) == 0.0


def test_schemes_of_other_parts_are_trained_stored_and_read_back(rows: Path, tmp_path: Path) -> None:
    """W4 language model, W8 projector, W8 tower (frozen, rounded once), W8 embedding and tied head."""
    parts = {"quant__projector": "w8g64", "quant__tower": "w8g32", "quant__head": "w8g128"}
    tree = recipe_tree(rows, runtime__checkpoint_every_steps=0, runtime__tower_cache_gib=0, optim__num_steps=2)
    tree["quant"] = {name.removeprefix("quant__"): scheme for name, scheme in parts.items()}
    tree["model"] = {"student": "toy:tiny", "teacher": "toy:tiny"}
    final = train(recipe_from(tree, "test"), tmp_path / "run")
    plan = json.loads((final / "grid" / "plan.json").read_text())
    schemes = {entry["name"]: entry["scheme"] for entry in plan["linears"]}
    assert schemes["model.language_model.layers.0.self_attn.q_proj"] == "w4g128"
    assert schemes["model.visual.merger.linear_fc1"] == "w8g64"
    assert schemes["model.visual.blocks.0.attn.qkv"] == "w8g32"
    assert schemes["model.language_model.embed_tokens"] == "w8g128"
    assert "lm_head" not in schemes
    assert plan["bf16"] == []
    assert verify(final, final).equal
    from grace_vlm.formats.registry import validate

    assert len(validate(final).linears) == len(schemes)
    loaded = load_model(str(final), "cpu").model
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight


def test_fp8_teacher_trains(rows: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("bf16", "fp8"):
        tree = recipe(rows, "tiny", optim__num_steps=2).model_dump(mode="json")
        tree["model"]["teacher_precision"] = precision
        train(recipe_from(tree, "test"), tmp_path / precision)
        losses.append(read_metrics(tmp_path / precision / "metrics.jsonl")[0]["distillation"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_teacher_of_another_family_is_refused(rows: Path, tmp_path: Path) -> None:
    from grace_vlm.errors import ConfigError

    tree = recipe(rows, "tiny").model_dump(mode="json")
    tree["model"]["teacher"] = "toy:qwen2_vl"
    with pytest.raises(ConfigError) as caught:
        train(recipe_from(tree, "test"), tmp_path / "run")
    assert str(caught.value) == (
        "the teacher is qwen2_vl and the student qwen3_vl; "
        "both see the same visual tokens only if they are of one family"
    )
    assert not (tmp_path / "run").exists()


def test_the_plan_is_said_before_training_and_stored(rows: Path, tmp_path: Path) -> None:
    said: list[str] = []
    final = train(recipe(rows, "tiny", optim__num_steps=1), tmp_path / "run", notify=said.append)
    plan = [line for line in said if line.startswith("plan: ")]
    assert "plan: language: 14 x w4g128, 393,216 bytes -> 101,376" in plan
    assert any(
        line.startswith("plan: tower: 8 x bf16, ") and line.endswith("(quant.tower gives it a grid)") for line in plan
    )
    assert (tmp_path / "run" / "plan.json").read_bytes() == (final / "grid" / "plan.json").read_bytes()


def test_a_student_in_the_original_llava_layout_trains(rows: Path, tmp_path: Path) -> None:
    """Its external tower is found, its keys are converted, and the run's folder is Transformers' own."""
    import original_llava
    from transformers import AutoModelForImageTextToText

    from grace_vlm.models.load import describe_model

    model = original_llava.toy_model()
    folder = original_llava.write_original(tmp_path / "llava", model)
    tower = original_llava.write_tower(tmp_path / "tower", model)
    tree = recipe_tree(rows, runtime__checkpoint_every_steps=0, runtime__tower_cache_gib=0, optim__num_steps=2)
    tree["method"], tree["scheme"] = "qat", "w4g32"
    tree["model"] = {"student": str(folder), "vision_tower": str(tower)}
    final = train(recipe_from(tree, "test"), tmp_path / "run")
    opened = AutoModelForImageTextToText.from_pretrained(final)
    assert type(opened).__name__ == "LlavaForConditionalGeneration"
    described, adapter = describe_model(str(folder))
    assert adapter.model_type == "llava"
    assert described.config.text_config.hidden_size == opened.config.text_config.hidden_size
