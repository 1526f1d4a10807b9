"""Our model folder: what is on the grid comes back, and every way of lying about it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import copy_of, edit_json, edit_tensors

from grace_vlm.checkpoint import verify_manifest
from grace_vlm.errors import CheckpointError, FormatError
from grace_vlm.formats.converter import CERTIFICATE
from grace_vlm.formats.folder import is_model_folder, read_grid, resolve_model, write_grid
from grace_vlm.formats.inspect import inspect_folder
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import detect, read_model, validate
from grace_vlm.formats.sidecar import SIDECAR
from grace_vlm.formats.verify import verify, verify_certificate
from grace_vlm.formats.weights import iter_weights
from grace_vlm.quant import QuantizedTensor, QuantScheme, bake

CODES = "grid/codes-00001-of-00001.safetensors"
FIRST = "model.language_model.layers.0.self_attn.q_proj"


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and a.scheme == b.scheme


@pytest.mark.parametrize("name", ["w4", "w8"])
def test_the_grid_comes_back(models: Path, on_grid: dict[str, dict[str, QuantizedTensor]], name: str) -> None:
    found = read_grid(models / name)
    assert list(found) == list(on_grid[name])
    assert all(same(found[key], tensor) for key, tensor in on_grid[name].items())
    weights = dict(iter_weights(models / name))
    assert all(torch.equal(weights[f"{key}.weight"], bake(tensor)) for key, tensor in found.items())
    plan = json.loads((models / name / "grid" / "plan.json").read_text())
    assert plan["linears"][0] == {
        "name": FIRST,
        "scheme": "w4g128" if name == "w4" else "w8g64",
        "scale_rounding": "bf16",
        "out_features": 128,
        "in_features": 128,
    }
    assert "lm_head" in plan["bf16"]
    assert "model.visual.blocks.0.attn.qkv" in plan["bf16"]


@pytest.mark.parametrize("name", ["w3", "sig5", "fp32", "mixed", "bf16"])
def test_every_kind_of_folder_validates(models: Path, name: str) -> None:
    content = validate(models / name)
    assert content.layout == "grace"
    assert detect(models / name).name == "grace"
    assert len(content.linears) == {"bf16": 0, "mixed": 13}.get(name, 14)


Change = Callable[[dict[str, torch.Tensor]], None]


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return change


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = value
        return tensor

    return change


CODES_CASES: list[tuple[Change, str]] = [
    (put(f"{FIRST}.codes", lambda t: t.to(torch.int16)), r"codes is torch.int16 \(128, 128\); expected torch.int8"),
    (put(f"{FIRST}.codes", lambda t: t[:, :64]), r"codes is torch.int8 \(128, 64\); expected torch.int8 \(128, 128\)"),
    (put(f"{FIRST}.codes", set_first(8)), r"codes leaves \[-8, 7\], the range of w4g128"),
    (put(f"{FIRST}.codes", set_first(-9)), r"codes leaves \[-8, 7\], the range of w4g128"),
    (put(f"{FIRST}.scale", lambda t: t.float()), r"scale is torch.float32 \(128, 1\); expected torch.bfloat16"),
    (put(f"{FIRST}.scale", lambda t: t.expand(128, 2)), r"scale is torch.bfloat16 \(128, 2\); expected"),
    (put(f"{FIRST}.scale", set_first(float("nan"))), "a value that is zero or not finite"),
    (put(f"{FIRST}.scale", set_first(float("inf"))), "a value that is zero or not finite"),
    (put(f"{FIRST}.scale", set_first(0.0)), "a value that is zero or not finite"),
    (lambda t: t.pop(f"{FIRST}.scale"), rf"{FIRST}.scale is missing"),
    (lambda t: t.update(ghost=torch.ones(1)), "ghost is not in the plan"),
]


@pytest.mark.parametrize(("change", "message"), CODES_CASES)
def test_wrong_codes_and_scales_are_refused(models: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = copy_of(models / "w4", tmp_path / "w4")
    edit_tensors(folder / CODES, change)
    with pytest.raises(FormatError, match=message) as caught:
        read_grid(folder)
    assert len(str(caught.value).splitlines()) == 1


PLAN_CASES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda p: p.update(format_version=2), "has format_version 2; this grace reads 1"),
    (lambda p: p.pop("bf16"), "needs two lists, 'linears' and 'bf16'"),
    (lambda p: p.update(bf16=[1]), "needs two lists, 'linears' and 'bf16'"),
    (lambda p: p["linears"][0].pop("scheme"), "expected exactly the keys"),
    (lambda p: p["linears"][0].update(extra=1), "expected exactly the keys"),
    (lambda p: p["linears"].append("q_proj"), "expected exactly the keys"),
    (lambda p: p["linears"][0].update(scheme="w5g128"), "unknown scheme 'w5g128'"),
    (lambda p: p["linears"][0].update(scheme="bf16"), "lists .* as bf16 among the quantized"),
    (lambda p: p["linears"][0].update(scheme="w4g96"), "group size 96 does not divide in_features 128"),
    (lambda p: p["linears"][0].update(scheme="w8g128"), None),
    (lambda p: p["linears"][0].update(scale_rounding="fp16"), "wrong name, scheme or scale_rounding"),
    (lambda p: p["linears"][0].update(scale_rounding="fp32"), "scale is torch.bfloat16 .* expected torch.float32"),
    (lambda p: p["linears"][0].update(out_features=-128), "expected two positive integers"),
    (lambda p: p["linears"][0].update(out_features=True), "expected two positive integers"),
    (lambda p: p["linears"][0].update(out_features=64), r"codes is torch.int8 \(128, 128\); expected"),
    (lambda p: p["linears"].append(p["linears"][0]), f"lists {FIRST} twice"),
    (lambda p: p["bf16"].append(FIRST), f"lists {FIRST} twice"),
    (lambda p: p["linears"].pop(0), rf"{FIRST}.codes is not in the plan"),
]


@pytest.mark.parametrize(("change", "message"), PLAN_CASES)
def test_a_plan_that_lies_is_refused(
    models: Path, tmp_path: Path, change: Callable[[Any], Any], message: str | None
) -> None:
    folder = copy_of(models / "w4", tmp_path / "w4")
    edit_json(folder / "grid" / "plan.json", change)
    if message is None:  # W4 codes are W8 codes too: nothing can tell, and the weight is the same
        assert read_grid(folder)[FIRST].scheme == QuantScheme(8, 128)
        return
    with pytest.raises(FormatError, match=message):
        read_grid(folder)


def test_no_grid(models: Path) -> None:
    with pytest.raises(FormatError, match=r"has no grid/plan\.json: it is not quantized"):
        read_grid(models / "bf16")


def test_a_grid_for_a_weight_that_is_not_there(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "w4")
    edit_tensors(folder / "model.safetensors", lambda t: t.pop(f"{FIRST}.weight"))
    with pytest.raises(FormatError, match=rf"{FIRST}\.weight of .* is missing; expected \(128, 128\)"):
        read_model(folder)


def test_codes_in_several_files(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4", tmp_path / "w4")
    grid = folder / "grid"
    (grid / "codes-00001-of-00001.safetensors").rename(grid / "codes-00001-of-00002.safetensors")
    with pytest.raises(FormatError, match="expected codes-00001-of-0000N"):
        read_grid(folder)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("grace", "config.json"),
        ("grace", "grid"),
        ("grace", "grid/plan.json"),
        ("grace", CODES),
        ("official", SIDECAR),
        ("official-awq", "awq_quantized_modules.json"),
        ("gguf", "mmproj.gguf"),
        ("gguf", CERTIFICATE),
    ],
)
def test_no_link_leads_out_of_the_folder(models: Path, tmp_path: Path, layout: str, name: str) -> None:
    folder = copy_of(models / "w4", tmp_path / "model") if layout == "grace" else tmp_path / "model"
    if layout != "grace":
        pack(models / "w4", folder, layout)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=rf"{name.partition('/')[0]}.* lies outside its folder"):
        verify_certificate(folder, None if name == CERTIFICATE else models / "w4-ct" / CERTIFICATE)
    if name == CERTIFICATE:
        with pytest.raises(FormatError, match="lies outside its folder"):
            inspect_folder(folder)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_manifest_elsewhere_is_none(models: Path, tmp_path: Path, name: str) -> None:
    folder = pack(models / "w4", tmp_path / "model", "gptq")
    assert inspect_folder(folder)["published_whole"]
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"has no {name}: it was never completely written"):
        verify_manifest(folder)
    assert not inspect_folder(folder)["published_whole"]


def test_a_snapshot_of_the_hub_is_read(models: Path, tmp_path: Path) -> None:
    """Its files are links into ``blobs``, also those of the grid."""
    snapshot, blobs = copy_of(models / "w4", tmp_path / "snapshots" / "main"), tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert verify(snapshot, models / "w4").equal


def test_write_grid_refuses_what_read_grid_would(tmp_path: Path) -> None:
    codes, scale = torch.zeros(4, 128, dtype=torch.int8), torch.ones(4, 1, dtype=torch.bfloat16)
    codes[0, 0] = 9
    with pytest.raises(FormatError, match=r"a.codes leaves \[-8, 7\]"):
        write_grid(tmp_path, {"a": QuantizedTensor(codes, scale, QuantScheme(4, 128))}, ())


def test_resolve_model(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy_of(models / "w4", run / "final")
    assert resolve_model(models / "w4") == models / "w4"
    assert resolve_model(run) == run / "final"
    assert is_model_folder(run / "final")
    assert not is_model_folder(run)
    with pytest.raises(CheckpointError, match="does not exist; expected a model folder or a run folder"):
        resolve_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no model folder .* if it is a run, let it finish first"):
        resolve_model(tmp_path)
