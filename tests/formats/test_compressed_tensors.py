"""pack-quantized: golden words, identity, stock Transformers, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_tiny, copy_of, edit_json, edit_tensors, random_questions, write_model_folder

from grace_vlm.errors import FormatError
from grace_vlm.formats.compressed_tensors import _pattern
from grace_vlm.formats.folder import ModelFolder, write_grid
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import read_model, validate
from grace_vlm.formats.shards import write_weights
from grace_vlm.formats.verify import verify
from grace_vlm.quant import QuantizedTensor, QuantScheme, bake

FIRST = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("num_bits", "codes", "word"),
    [
        (4, list(range(-8, 0)), 0x76543210),
        (4, [-8] * 8, 0),
        (4, [7] * 8, 0xFFFFFFFF - (1 << 32)),
        (4, [0] * 8, 0x88888888 - (1 << 32)),
        (8, [-128, -127, 0, 127], 0xFF800100 - (1 << 32)),
    ],
)
def test_golden_words(tmp_path: Path, num_bits: int, codes: list[int], word: int) -> None:
    """A whole folder with one linear whose first columns are these codes; the word is read from the file."""
    full = torch.zeros(2, 128, dtype=torch.int8)
    full[0, : len(codes)] = torch.tensor(codes, dtype=torch.int8)
    tensor = QuantizedTensor(full, torch.full((2, 1), 0.5, dtype=torch.bfloat16), QuantScheme(num_bits, 128))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "any"}')
    write_weights(source, {"x.weight": bake(tensor)})
    write_grid(source, {"x": tensor}, ())
    pack(source, tmp_path / "packed", "compressed-tensors")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored["x.weight_packed"][0, 0].item() == word
    assert stored["x.weight_packed"].dtype == torch.int32
    assert stored["x.weight_packed"].shape == (2, 128 * num_bits // 32)
    assert stored["x.weight_scale"].dtype == torch.bfloat16
    assert stored["x.weight_shape"].tolist() == [2, 128]
    assert stored["x.weight_shape"].dtype == torch.int64
    assert len(stored) == 3


@pytest.mark.parametrize("name", ["w4", "w8"])
def test_pack_then_read_is_the_identity(
    models: Path, on_grid: dict[str, dict[str, QuantizedTensor]], name: str
) -> None:
    content = validate(models / f"{name}-ct")
    assert content.layout == "compressed-tensors"
    assert content.linears.keys() == on_grid[name].keys()
    assert content.baked == {}
    for key, tensor in on_grid[name].items():
        found = content.quantized[key]
        assert torch.equal(found.codes, tensor.codes)
        assert torch.equal(found.scale, tensor.scale)
        assert found.scheme == tensor.scheme


def test_files_and_config(models: Path) -> None:
    folder = models / "w4-ct"
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                    "actorder": None,
                    "observer_kwargs": {},
                },
            }
        },
        "ignore": ["lm_head", r"re:.*\.lm_head$", "re:.*visual.*"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    assert config == json.loads((models / "w4" / "config.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "processor_config.json", "chat_template.jinja", "README.md", "manifest.json"} <= names
    assert "grid" not in names
    assert not any(name.startswith(FIRST + ".weight") and name.endswith(".weight") for name in load_weights(folder))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("module", "vllm"),
    [
        ("model.language_model.layers.1.mlp.down_proj", "language_model.model.layers.1.mlp.down_proj"),
        ("lm_head", "language_model.lm_head"),
    ],
)
def test_patterns_match_in_both_name_spaces(module: str, vllm: str) -> None:
    pattern = _pattern(module).removeprefix("re:")
    assert re.match(pattern, module)
    assert re.match(pattern, vllm)
    assert not re.match(pattern, module.replace("layers.1", "layers.11") + "x")
    assert not re.match(pattern, "model.language_model.layers.11.mlp.down_proj")


def load_stock(folder: Path, **options: Any) -> Any:
    """As a user would, without us; missing and unexpected keys are failures."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


FIRST_GROUP_ONLY = pytest.mark.xfail(
    strict=True, raises=RuntimeError, reason="Transformers 5.23, dequantize=True: every layer by the first config group"
)


@pytest.mark.parametrize(
    ("name", "dequantize"),
    [
        *((name, dequantize) for name in ("w4", "w8", "sig5") for dequantize in (False, True)),
        ("mixed", False),
        pytest.param("mixed", True, marks=FIRST_GROUP_ONLY),
    ],
)
def test_stock_transformers_gives_the_baked_logits(models: Path, processor: Any, name: str, dequantize: bool) -> None:
    """Default mode and dequantize=True, text and pictures, BF16: the difference of logits is 0.0."""
    from transformers import CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    baked, packed = load_stock(models / name), load_stock(models / f"{name}-ct", **options)
    spread = 0.0
    with torch.no_grad():
        for inputs in random_questions(processor, 6, seed=3):
            expected, found = baked(**inputs).logits, packed(**inputs).logits
            assert (expected.float() - found.float()).abs().max().item() == 0.0
            spread = max(spread, expected.float().std().item())
    assert spread > 0.01


def test_stock_transformers_sees_a_changed_code(models: Path, processor: Any, tmp_path: Path) -> None:
    """The comparison above can fail: one nibble, and the logits differ."""
    folder = copy_of(models / "w4-ct", tmp_path / "changed")

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.language_model.layers.0.mlp.down_proj.weight_packed"][:, 0] ^= 0x4

    edit_tensors(folder / "model.safetensors", flip)
    baked, packed = load_stock(models / "w4"), load_stock(folder)
    with torch.no_grad():
        differences = [
            (baked(**inputs).logits - packed(**inputs).logits).abs().max().item()
            for inputs in random_questions(processor, 3, seed=3)
        ]
    assert max(differences) > 0


REFUSED = [
    (
        "w3",
        f"{FIRST} is w3g128; compressed-tensors packs 4 or 8 bits: quantize to w4g128 or w8g128",
    ),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_what_it_cannot_hold_is_refused(models: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        pack(models / name, tmp_path / "out", "compressed-tensors")
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["bf16", "w8g128", "w4g64"])
def test_a_split_fused_group_is_refused(tmp_path: Path, other: str) -> None:
    model, processor = build_tiny()
    source = tmp_path / "source"
    write_model_folder(source, model, processor, lambda n: other if n.endswith("layers.1.mlp.up_proj") else "w4g128")
    with pytest.raises(FormatError) as caught:
        pack(source, tmp_path / "out", "compressed-tensors")
    assert str(caught.value) == (
        "model.language_model.layers.1.mlp.gate_proj is w4g128 but model.language_model.layers.1.mlp.up_proj is "
        f"{other}; vLLM fuses gate_proj, up_proj: give them one scheme"
    )


Change = Callable[[Any], Any]


def in_group(**changes: Any) -> Change:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


CONFIG_CASES: list[tuple[Change, str]] = [
    (lambda c: c["quantization_config"].update(format="int-quantized"), "format 'int-quantized'; expected"),
    (lambda c: c["quantization_config"].update(config_groups={}), "has no config_groups"),
    (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "group_0 quantizes activations",
    ),
    (in_group(num_bits=2), "group_0 is num_bits 2"),
    (in_group(num_bits="4"), "group_0 is num_bits '4'"),
    (in_group(symmetric=False), "{'symmetric': False}"),
    (in_group(strategy="channel"), "{'strategy': 'channel'}"),
    (in_group(actorder="group"), "{'actorder': 'group'}"),
    (in_group(group_size=0), "group_size 0"),
    (in_group(group_size=64), "fits no compressed-tensors linear of w4g64"),
    (in_group(num_bits=8), "fits no compressed-tensors linear of w8g128"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_CASES)
def test_a_configuration_that_lies_is_refused(models: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = copy_of(models / "w4-ct", tmp_path / "copy")
    edit_json(folder / "config.json", change)
    with pytest.raises(FormatError, match=message) as caught:
        validate(folder)
    assert len(str(caught.value).splitlines()) == 1


TENSOR_CASES: list[tuple[Change, str]] = [
    (lambda t: t.pop(f"{FIRST}.weight_scale"), rf"{FIRST} has weight_packed .* fits no"),
    (lambda t: t.pop(f"{FIRST}.weight_shape"), rf"{FIRST} has weight_packed .* fits no"),
    (
        lambda t: t.pop(f"{FIRST}.weight_packed"),
        f"has {FIRST}.weight_s.*, which is no tensor of a compressed-tensors linear",
    ),
    (lambda t: t.update({f"{FIRST}.weight_zero_point": torch.zeros(1)}), "weight_zero_point, which is no tensor of"),
    (lambda t: t[f"{FIRST}.weight_shape"].fill_(-128), "fits no"),
    (lambda t: t[f"{FIRST}.weight_shape"].copy_(torch.tensor([128, 2**40])), "fits no"),
    (lambda t: t.update({f"{FIRST}.weight_shape": torch.tensor([128, 128, 1])}), r"weight_shape torch.int64 \(3,\)"),
    (
        lambda t: t.update({f"{FIRST}.weight_packed": t[f"{FIRST}.weight_packed"].float()}),
        "weight_packed torch.float32",
    ),
    (lambda t: t.update({f"{FIRST}.weight_scale": t[f"{FIRST}.weight_scale"].int()}), "weight_scale torch.int32"),
    (lambda t: t[f"{FIRST}.weight_scale"].fill_(float("nan")), "zero or not finite"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_CASES)
def test_tensors_that_lie_are_refused(models: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = copy_of(models / "w4-ct", tmp_path / "copy")
    edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(FormatError, match=message) as caught:
        validate(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_back_to_our_own_folder(models: Path, tmp_path: Path) -> None:
    """The codes survive, so a packed model can be packed again, as anything."""
    pack(models / "w4-ct", tmp_path / "ours", "grace")
    assert verify(models / "w4", tmp_path / "ours").equal
    assert ModelFolder().read(tmp_path / "ours").linears.keys() == read_model(models / "w4").linears.keys()
