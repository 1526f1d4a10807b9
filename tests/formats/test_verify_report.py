"""verify: equal across layouts, and every kind of difference is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import copy_of, edit_json, edit_tensors

from grace_vlm.errors import CheckpointError, FormatError
from grace_vlm.formats.qat import SIDECAR
from grace_vlm.formats.values import compare_values
from grace_vlm.formats.verify import verify

IN_ORDER = "model.language_model.layers.0.mlp.down_proj"
FIRST = "model.language_model.layers.0.self_attn.q_proj"
DENSE = "model.visual.blocks.0.attn.qkv.bias"


@pytest.mark.parametrize("name", ["w4", "w8", "sig5", "mixed"])
def test_equal_across_layouts(models: Path, name: str) -> None:
    folders = [models / name, models / f"{name}-ct", models / f"{name}-official"]
    folders = [folder for folder in folders if folder.exists()]
    for a in folders:
        for b in folders:
            report = verify(a, b)
            assert report.equal, str(report.first)
            assert report.num_linears == (13 if name == "mixed" else 14)
            assert report.num_different == 0
            assert report.num_tensors == (50 if name == "mixed" else 49)
    if name == "w4":
        assert (report.num_codes, report.num_scales, report.num_values) == (196_608, 1536, 190_880)
        assert (report.layout_a, report.layout_b) == ("official", "official")


def test_bf16_folders_compare_too(models: Path) -> None:
    report = verify(models / "bf16", models / "bf16")
    assert report.equal
    assert report.num_linears == 0
    assert report.num_tensors == 63


def change_first(amount: float) -> Callable[[torch.Tensor], None]:
    def change(tensor: torch.Tensor) -> None:
        tensor.view(-1)[5] += amount

    return change


def differs(a: Path, b: Path) -> str:
    report, mirrored = verify(a, b), verify(b, a)
    assert not report.equal
    assert not mirrored.equal
    assert report.num_different >= 1
    assert mirrored.first is not None
    assert report.first is not None
    assert mirrored.first.tensor.replace(" of A", " of B") == report.first.tensor.replace(" of A", " of B")
    return str(report.first)


def test_a_code(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4-ct", tmp_path / "copy")

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{FIRST}.weight_packed"][3, 2] ^= 1 << 4

    edit_tensors(folder / "model.safetensors", flip)
    said = differs(models / "w4", folder)
    assert said.startswith(f"{FIRST}.codes[3, 17]: ")
    assert verify(models / "w4", folder).num_different == 2  # the code and the weight


def test_a_scale(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4-ct", tmp_path / "copy")
    edit_tensors(folder / "model.safetensors", lambda t: change_first(1.0)(t[f"{FIRST}.weight_scale"]))
    assert differs(models / "w4", folder).startswith(f"{FIRST}.scale[5, 0]: 0.0")


def test_a_baked_weight_that_is_not_its_codes(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")
    edit_tensors(folder / "model.safetensors", lambda t: change_first(1.0)(t[f"{FIRST}.weight"]))
    assert differs(models / "w4", folder).startswith(f"{FIRST}.weight[0, 5]: ")
    said = str(verify(folder, folder).first)
    assert said.startswith(f"{FIRST}.weight of A[0, 5]: ")
    assert said.endswith("= bf16(q * s) in B")


def test_a_negative_zero_is_no_difference(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "copy")

    def negate(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{FIRST}.weight"]
        assert (weight == 0).any()
        weight[weight == 0] = -0.0

    edit_tensors(folder / "model.safetensors", negate)
    assert verify(models / "w4", folder).equal


def test_the_unquantized_rest(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    edit_tensors(folder / "model.safetensors", lambda t: change_first(0.5)(t[DENSE]))
    assert differs(models / "w4-ct", folder) == f"{DENSE}[5]: 0.0 in A, 0.5 in B"
    edit_tensors(folder / "model.safetensors", lambda t: t.pop(DENSE))
    assert differs(models / "w4-ct", folder) == f"{DENSE}: present in A, missing in B"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({DENSE: torch.zeros(3)}))
    assert differs(models / "w4-ct", folder) == f"{DENSE}: shape (96,) in A, shape (3,) in B"


def test_linears_and_schemes(models: Path) -> None:
    assert differs(models / "w4", models / "bf16") == f"{IN_ORDER}: quantized in A, missing in B"
    assert differs(models / "w4", models / "w8-ct") == f"{IN_ORDER}: w4g128 in A, w8g64 in B"
    assert differs(models / "w4", models / "fp32").startswith(f"{IN_ORDER}.codes[0, ")


def test_the_order_is_that_of_the_layers(models: Path, tmp_path: Path) -> None:
    from grace_vlm.formats.verify import _by_layer

    names = [f"model.layers.{i}.x" for i in (10, 2, 1)] + ["lm_head"]
    names.append(f"x.{'7' * 5000}")
    names.append("x.\u0663.y")  # a digit that is no number of a layer
    assert sorted(names, key=_by_layer)[:4] == ["lm_head", *(f"model.layers.{i}.x" for i in (1, 2, 10))]


def test_values_are_what_is_compared() -> None:
    one = torch.tensor([[1.0, float("nan"), -0.0]])
    assert compare_values("x", one, one.clone()) is None
    assert compare_values("x", one, torch.tensor([[1.0, float("nan"), 0.0]]).to(torch.bfloat16)) is None
    for other, index in (([[1.0, 2.0, 0.0]], (0, 1)), ([[1.0, float("nan"), 1e-30]], (0, 2))):
        difference = compare_values("x", one, torch.tensor(other))
        assert difference is not None
        assert difference.index == index
    assert compare_values("x", torch.tensor(1.0), torch.tensor(2.0)).index == ()  # type: ignore[union-attr]
    assert compare_values("x", torch.empty(0, 3), torch.empty(0, 3)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(quant_method="hqq"), r"unknown layout \(quant_method 'hqq'\)"),
        (lambda c: c["quantization_config"].update(quant_method="x" * 5000), r"\(quant_method 'x{76}\.\.\.\)"),
    ],
)
def test_an_unknown_layout(models: Path, tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    folder = copy_of(models / "w4-ct", tmp_path / "copy")
    edit_json(folder / "config.json", change)
    with pytest.raises(FormatError, match=message) as caught:
        verify(models / "w4", folder)
    assert "readable are official-awq, official, compressed-tensors" in str(caught.value)


NO_LAYOUT = "quantization_config {}; expected an object, or no such key for BF16 weights"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quantization_config=7), NO_LAYOUT.format(7)),
        (lambda c: c.update(quantization_config=None), NO_LAYOUT.format("null")),
        (lambda c: c.update(qat={}, quantization_config=None), NO_LAYOUT.format("null")),
        (
            lambda c: c["quantization_config"].pop("quant_method"),
            "a quantization_config without quant_method; expected the name of a layout there",
        ),
    ],
)
def test_a_statement_that_names_no_layout(
    models: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    folder = copy_of(models / "w4-ct", tmp_path / "copy")
    edit_json(folder / "config.json", change)
    with pytest.raises(FormatError) as caught:
        verify(models / "w4", folder)
    assert str(caught.value) == f"{folder / 'config.json'} has {message}"


def test_an_official_folder_without_its_pickle(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    (folder / SIDECAR).unlink()
    with pytest.raises(FormatError) as caught:
        verify(models / "w4", folder)
    assert str(caught.value) == (
        f"{folder / 'config.json'} has a 'qat' section, and its scales are not there; put {SIDECAR} beside it"
    )


def test_a_run_folder_stands_for_its_final(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "w4", tmp_path / "run" / "final")
    assert verify(tmp_path / "run", models / "w4-ct").equal
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "nowhere", models / "w4")
