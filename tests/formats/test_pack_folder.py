"""pack: any layout into any other, proven before it is published, or nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import copy_of

from grace_vlm.checkpoint import is_complete, verify_manifest
from grace_vlm.errors import CheckpointError, ConfigError, FormatError
from grace_vlm.formats import compressed_tensors, packed
from grace_vlm.formats.pack import estimate_bytes, pack
from grace_vlm.formats.registry import converter_for, converters, detect, read_model
from grace_vlm.formats.verify import verify


@pytest.mark.parametrize("name", ["w4", "w8"])
@pytest.mark.parametrize("first", ["grace", "compressed-tensors", "official"])
@pytest.mark.parametrize("second", ["grace", "compressed-tensors", "official"])
def test_any_layout_into_any_other(models: Path, tmp_path: Path, name: str, first: str, second: str) -> None:
    pack(models / name, tmp_path / "one", first)
    pack(tmp_path / "one", tmp_path / "two", second)
    assert detect(tmp_path / "two").name == second
    report = verify(models / name, tmp_path / "two")
    assert report.equal, str(report.first)
    verify_manifest(tmp_path / "two")


@pytest.mark.parametrize("name", ["w4", "w4-ct", "w4-official", "w8", "w8-ct"])
@pytest.mark.parametrize("format_name", ["grace", "compressed-tensors", "official"])
def test_the_estimate_of_space_is_close_from_above(models: Path, tmp_path: Path, name: str, format_name: str) -> None:
    estimated = estimate_bytes(read_model(models / name), converter_for(format_name))
    pack(models / name, tmp_path / "out", format_name)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written <= estimated <= 1.1 * written + (1 << 20)


def digest(folder: Path) -> str:
    parts = [f"{p.relative_to(folder)} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in folder.rglob("*.*")]
    return "\n".join(sorted(parts))


@pytest.mark.parametrize("format_name", ["grace", "compressed-tensors", "official"])
def test_packing_twice_gives_the_same_bytes(models: Path, tmp_path: Path, format_name: str) -> None:
    for name in ("one", "two"):
        pack(models / "w4", tmp_path / name, format_name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_refuses_an_existing_target_without_overwrite(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    pack(models / "w4", target, "compressed-tensors")
    before = digest(target)
    with pytest.raises(CheckpointError) as caught:
        pack(models / "w8", target, "compressed-tensors")
    assert str(caught.value) == f"{target} already exists; choose another path or pass --overwrite"
    assert digest(target) == before
    pack(models / "w8", target, "compressed-tensors", overwrite=True)
    assert verify(models / "w8", target).equal
    assert os.listdir(tmp_path) == ["out"]


def test_what_cannot_be_packed(models: Path, tmp_path: Path) -> None:
    for source, format_name, error, message in (
        (models / "bf16", "official", FormatError, "has no grid, so there is nothing to pack; quantize it first"),
        (
            models / "w4",
            "onnx",
            ConfigError,
            "unknown format 'onnx'; expected one of official-awq, official, compressed-tensors",
        ),
        (tmp_path / "nowhere", "official", CheckpointError, "does not exist; expected a model folder"),
        (models, "official", CheckpointError, "is no model folder"),
    ):
        with pytest.raises(error, match=message):
            pack(source, tmp_path / "out", format_name)
    assert list(tmp_path.iterdir()) == []


def test_never_into_its_own_source(models: Path, tmp_path: Path) -> None:
    source = copy_of(models / "w4", tmp_path / "w4")
    for target, said in ((source, "is"), (source / "packed", "lies inside"), (tmp_path / "w4" / ".." / "w4", "is")):
        with pytest.raises(CheckpointError, match=f" {said} .*; choose a folder elsewhere"):
            pack(source, target, "compressed-tensors", overwrite=True)
    assert verify(models / "w4", source).equal


def test_never_over_its_own_source(models: Path, tmp_path: Path) -> None:
    """--overwrite of a published folder that holds the source would delete what is read."""
    target = pack(models / "w4", tmp_path / "out", "compressed-tensors")
    source = copy_of(models / "w4", target / "inner")
    with pytest.raises(CheckpointError) as refusal:
        pack(source, target, "awq", overwrite=True)
    assert str(refusal.value) == f"{target} holds {source}; choose a folder elsewhere"
    assert verify(source, models / "w4").equal


def test_a_killed_write_is_recovered_by_the_next(models: Path, tmp_path: Path) -> None:
    """State 2 of atomic.py (killed between two renames), and a stage that nobody will finish."""
    pack(models / "w4", tmp_path / "out", "compressed-tensors")
    before = digest(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".replaced-out-999999999")
    (tmp_path / ".partial-out-999999999").mkdir()
    (tmp_path / ".partial-other-999999999").mkdir()  # not ours to judge
    with pytest.raises(CheckpointError, match="already exists"):
        pack(models / "w4", tmp_path / "out", "compressed-tensors")
    assert digest(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-other-999999999", "out"]


def test_nothing_is_published_that_does_not_read_back(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect planted in the packer: one nibble of one word."""
    real = compressed_tensors.pack_rows

    def defective(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
        words = real(codes, num_bits)
        words[-1, -1] ^= 1
        return words

    monkeypatch.setattr(compressed_tensors, "pack_rows", defective)
    with pytest.raises(FormatError, match=r"out is not published: it would not be equal to .*\.codes\[127, 120\]: "):
        pack(models / "w4", tmp_path / "out", "compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_publishes_nothing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "write_weights", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*/out: the disk is full \([0-9,]+ bytes needed\)"):
        pack(models / "w4", tmp_path / "out", "compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_only_harmless_companions_are_copied(models: Path, tmp_path: Path) -> None:
    source = copy_of(models / "w4", tmp_path / "w4")
    for name in ("modeling_evil.py", "optimizer.pt", "pytorch_model.bin", ".hidden.json", "LICENSE", "merges.txt"):
        (source / name).write_text("x")
    for name in ("quantize_config.json", "adapter_config.json"):
        (source / name).write_text("{}")
    pack(source, tmp_path / "out", "compressed-tensors")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "merges.txt", "tokenizer.json", "generation_config.json"} <= copied
    assert not copied & {"modeling_evil.py", "optimizer.pt", "pytorch_model.bin", ".hidden.json"}
    assert not copied & {"quantize_config.json", "adapter_config.json"}, "they state another layout"
    assert is_complete(tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize("format_name", ["compressed-tensors", "gguf", "grace"])
def test_a_companion_that_is_a_link_out_of_the_folder(
    models: Path, tmp_path: Path, name: str, format_name: str
) -> None:
    source, elsewhere = copy_of(models / "w4", tmp_path / "w4"), tmp_path / "elsewhere"
    elsewhere.write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(elsewhere)
    line = f"{source / name} lies outside its folder (a symbolic link); copy the file there"
    with pytest.raises(FormatError) as caught:
        pack(source, tmp_path / "out", format_name)
    assert str(caught.value) == line
    (source / name).unlink()
    (source / name).symlink_to("nowhere")
    with pytest.raises(FormatError, match=rf"{name} is a link to a file that is not there; copy or download the file"):
        pack(source, tmp_path / "out", format_name)
    assert not (tmp_path / "out").exists()


def test_companions_of_a_snapshot_of_the_hub_are_copied(models: Path, tmp_path: Path) -> None:
    snapshot, blobs = copy_of(models / "w4", tmp_path / "snapshots" / "main"), tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    pack(snapshot, tmp_path / "out", "compressed-tensors")
    for name in ("tokenizer.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (models / "w4" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "layout", "of_a_weight", "of_a_linear"),
    [
        ("w4", "grace", 16 + 8 + 16 / 128, 0),
        ("w4", "official", 16 + 16 + 32 / 128, 0),
        ("w4", "compressed-tensors", 4 + 16 / 128, 16),
        ("w4", "mlx", 4 + 2 * 32 / 128, 0),
        ("w8", "mlx", 8 + 2 * 32 / 64, 0),
        ("sig5", "mlx", 4 + 2 * 16 / 32, 0),
        ("w4", "awq", 4 + 16 / 128 + 4 / 128, 0),
        ("w4", "gguf", 18 / 4, 0),
        ("w8", "gguf", 34 / 4, 0),
    ],
)
def test_inspect_counts_what_the_layout_stores(
    models: Path, tmp_path: Path, name: str, layout: str, of_a_weight: float, of_a_linear: int
) -> None:
    folder, calls = pack(models / name, tmp_path / "out", layout), []
    found = detect(folder).inspect(folder, lambda done, total: calls.append((done, total)))
    for linear in found["linears"]:
        weights = linear["out_features"] * linear["in_features"]
        assert linear["bytes"] == weights * of_a_weight / 8 + of_a_linear, linear["name"]
    total, weights = sum(linear["bytes"] for linear in found["linears"]), found["quantized_weights"]
    assert found["bits_per_quantized_weight"] == round(8 * total / weights, 4)
    assert len(calls) == found["quantized_linears"] == len(dict(calls))
    assert calls[-1] == (weights, weights)


def test_inspect(models: Path) -> None:
    layouts = converters()
    for name, layout, bits in (
        ("w4", "grace", 4.125),
        ("w8-ct", "compressed-tensors", 8.25),
        ("w3-official", "official", 3.125),
    ):
        found = layouts[layout].inspect(models / name)
        assert found["layout"] == layout
        assert found["model_type"] == "qwen3_vl"
        assert found["grid_bits_per_quantized_weight"] == bits
        assert found["quantized_linears"] == 14
        assert sum(found["schemes"].values()) == 14
        assert found["weight_bytes"] > 400_000
        first = found["linears"][0]
        assert (first["bits"], first["group_size"]) == (int(name[1]), 64 if name.startswith("w8") else 128)
        assert 0 < first["scale_min"] <= first["scale_max"]
        assert 0 < first["clipped"] < 0.5
    assert layouts["grace"].inspect(models / "bf16")["bits_per_quantized_weight"] is None
