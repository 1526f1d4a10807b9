"""GGUF against the ``gguf`` package: its reader and dequantizer on our files, our reader on files of its quantizer."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_models import FAMILIES, write_family
from tiny_models import build_tiny, copy_of, write_model_folder

from grace_vlm.errors import CheckpointError, FormatError
from grace_vlm.formats.gguf_file import ALIGNMENT, GgufFile
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import read_model
from grace_vlm.formats.verify import verify
from grace_vlm.quant import bake

OURS = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"} | {
    f"ffn_{part}": f"{part}_proj" for part in ("gate", "up", "down")
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Path]]:
    """(family, scheme) -> (model folder, its GGUF folder)."""
    root, found = tmp_path_factory.mktemp("gguf"), {}
    for family in FAMILIES:
        for scheme in ("w4g128", "w8g64"):
            source = write_family(root / f"{family}-{scheme}", family, scheme)
            found[family, scheme] = source, pack(source, root / f"{family}-{scheme}-gguf", "gguf")
    return found


def in_their_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's converter of Llama models reorders them, with its own expression."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4g128", "w8g64"])
def test_their_dequantizer_gives_the_grid(
    folders: dict[tuple[str, str], tuple[Path, Path]], family: str, scheme: str
) -> None:
    source, packed = folders[family, scheme]
    content = read_model(source)
    reader = gguf.GGUFReader(packed / "model.gguf")
    kind = gguf.GGMLQuantizationType.Q4_0 if scheme == "w4g128" else gguf.GGMLQuantizationType.Q8_0
    found = {t.name: t for t in reader.tensors if t.tensor_type == kind}
    assert len(found) == len(content.linears) == 14
    for name, tensor in found.items():
        _, layer, module, _ = name.split(".")
        ours = next(n for n in content.linears if f"layers.{layer}." in n and n.endswith(OURS[module]))
        grid = content.quantized[ours]
        wide = grid.scale.float().repeat_interleave(grid.scheme.group_size, 1)
        expected, baked = grid.codes.float() * wide, bake(grid)
        if family == "LLaVA-1.5" and module in ("attn_q", "attn_k"):
            expected, baked = in_their_order(expected, 2), in_their_order(baked, 2)
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, kind).copy())
        assert torch.equal(weight, expected), name
        assert torch.equal(weight.to(torch.bfloat16), baked), name
        assert tensor.shape.tolist() == [*reversed(baked.shape)]


@pytest.mark.parametrize("family", FAMILIES)
def test_their_reader_opens_both_files(folders: dict[tuple[str, str], tuple[Path, Path]], family: str) -> None:
    source, packed = folders[family, "w4g128"]
    text, vision = gguf.GGUFReader(packed / "model.gguf"), gguf.GGUFReader(packed / "mmproj.gguf")
    architecture = text.fields["general.architecture"].contents()
    assert architecture == {"Qwen3-VL": "qwen3vl", "Qwen2-VL": "qwen2vl", "LLaVA-1.5": "llama"}[family]
    assert text.fields[f"{architecture}.block_count"].contents() == 2
    assert text.fields["grace.group_size"].contents() == 128
    assert vision.fields["general.architecture"].contents() == "clip"
    tokens = text.fields["tokenizer.ggml.tokens"].contents()
    (embedding,) = (t for t in text.tensors if t.name == "token_embd.weight")
    assert len(tokens) == embedding.shape[1]
    kinds = {gguf.GGMLQuantizationType(t.tensor_type).name for t in vision.tensors}
    assert kinds == {"F32", "BF16"}
    assert all(t.data_offset % ALIGNMENT == 0 for t in [*text.tensors, *vision.tensors])
    total = sum(tensor.n_elements for tensor in [*text.tensors, *vision.tensors])
    content = read_model(source)
    dense = sum(content.dense[name].numel() for name in content.dense)
    assert total == dense + sum(entry.in_features * entry.out_features for entry in content.linears.values())


def test_the_same_bytes_again(folders: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path) -> None:
    source, packed = folders["Qwen3-VL", "w4g128"]
    again = pack(source, tmp_path / "again", "gguf")
    for path in packed.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


# Files of other people's making


def theirs(packed: Path, target: Path, change: Any) -> Path:
    """``packed`` written again by the gguf package, ours' own metadata left out, each tensor as ``change`` gives it."""
    target.mkdir()
    for name in ("config.json", "mmproj.gguf"):
        shutil.copy(packed / name, target / name)
    reader = gguf.GGUFReader(packed / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target / "anything-Q.gguf", architecture)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "grace.")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        data, kind = change(tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(("kind", "scheme"), [("Q4_0", "w4g32"), ("Q8_0", "w8g32")])
def test_a_file_of_their_quantizer(
    folders: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path, kind: str, scheme: str
) -> None:
    """Weights off our grids: negative scales (Q4_0), scales that BF16 does not hold, groups of 32."""
    number = gguf.GGMLQuantizationType[kind]
    generator = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}

    def change(tensor: Any) -> tuple[np.ndarray, Any]:
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0):
            return tensor.data, tensor.tensor_type
        shape = tuple(reversed(tensor.shape.tolist()))
        quantized = gguf.quants.quantize(generator.normal(size=shape).astype(np.float32), number)
        weights[tensor.name] = gguf.quants.dequantize(quantized, number)
        return quantized, number

    folder = theirs(folders["Qwen3-VL", "w4g128"][1], tmp_path / "theirs", change)
    content = read_model(folder)
    assert len(content.linears) == 14
    for name, entry in content.linears.items():
        assert entry.scheme is not None
        assert entry.scheme.name == scheme
        grid = content.quantized[name]
        module = next(theirs for theirs, ours in OURS.items() if name.endswith(ours))
        layer = name.split("layers.")[1].split(".")[0]
        wide = grid.scale.float().repeat_interleave(32, 1)
        assert torch.equal(grid.codes.float() * wide, torch.from_numpy(weights[f"blk.{layer}.{module}.weight"]))
    rounded_on_its_way = pack(folder, tmp_path / "ours", "grace")
    assert verify(folder, rounded_on_its_way).equal


def test_our_blocks_without_our_metadata_are_groups_of_32(
    folders: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, packed = folders["Qwen3-VL", "w4g128"]
    folder = theirs(packed, tmp_path / "theirs", lambda tensor: (tensor.data, tensor.tensor_type))
    content, expected = read_model(folder), read_model(source)
    assert content.linears.keys() == expected.linears.keys()
    for name, grid in expected.quantized.items():
        found = content.quantized[name]
        assert found.scheme.name == "w4g32"
        assert torch.equal(found.codes, grid.codes)
        assert torch.equal(bake(found), bake(grid))


def test_another_element_type_is_named(folders: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q5_0

    def change(tensor: Any) -> tuple[np.ndarray, Any]:
        if tensor.name != "blk.0.attn_q.weight":
            return tensor.data, tensor.tensor_type
        shape = tuple(reversed(tensor.shape.tolist()))
        return gguf.quants.quantize(np.ones(shape, np.float32), kind), kind

    folder = theirs(folders["Qwen3-VL", "w4g128"][1], tmp_path / "theirs", change)
    with pytest.raises(FormatError, match=r"'blk\.0\.attn_q\.weight' has element type 6; read are F32, F16, BF16"):
        read_model(folder)


# What is refused


@pytest.mark.parametrize(
    ("scheme_of", "message"),
    [
        (lambda name: "w3g128", "is w3g128; gguf holds w4 or w8 only"),
        (lambda name: "w4g16", "is w4g16; gguf needs groups of a multiple of 32"),
        (lambda name: "w4g128" if "layers.0" in name else "w4g64", r"one group size for the whole model.*\[64, 128\]"),
    ],
)
def test_grids_that_gguf_does_not_hold(tmp_path: Path, scheme_of: Any, message: str) -> None:
    write_model_folder(tmp_path / "model", *build_tiny(), scheme_of)
    with pytest.raises(FormatError, match=message):
        pack(tmp_path / "model", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "gguf carries the tokenizer, and there is no tokenizer.json"),
        ("processor_config.json", "there is no preprocessor_config.json with them"),
    ],
)
def test_a_companion_that_is_missing(models: Path, tmp_path: Path, missing: str, message: str) -> None:
    folder = copy_of(models / "w4", tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(FormatError, match=message):
        pack(folder, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_one_file_of_two(folders: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path) -> None:
    folder = copy_of(folders["Qwen3-VL", "w4g128"][1], tmp_path / "copy")
    (folder / "mmproj.gguf").unlink()
    with pytest.raises(FormatError, match="1 GGUF files of text and 0 of a vision tower; expected one of each"):
        read_model(folder)


def test_without_a_configuration_it_is_read_but_not_packed(
    folders: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, packed = folders["Qwen3-VL", "w4g128"]
    folder = copy_of(packed, tmp_path / "copy")
    (folder / "config.json").unlink()
    assert verify(source, folder).equal
    with pytest.raises((FormatError, CheckpointError), match=r"has no config\.json, which compressed-tensors needs"):
        pack(folder, tmp_path / "out", "compressed-tensors")


# A file cut or damaged at one place, by name; tests/formats/test_mutations.py does it by thousands


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(num_tensors: int, num_values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + rest


def line(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header reaches byte 4 of 0"),
        (b"GGML" + bytes(20), "it does not begin with GGUF"),
        (header(0, 0, version=1), "version 1; read are 2 and 3"),
        (header(1 << 40, 0), "at most 65536 are read"),
        (header(0, 1, struct.pack("<Q", 1 << 62)), "its header reaches byte"),
        (header(0, 1, string("a") + struct.pack("<IIQ", 9, 4, 1 << 60)), "its arrays have"),
        (header(0, 1, string("a") + struct.pack("<IIQ", 9, 9, 1)), "no array in an array"),
        (header(0, 2, (string("a") + struct.pack("<II", 4, 1)) * 2), "value 'a' is there twice"),
        (header(1, 0, line("a", (1,) * 5)), "tensor 'a' has 5 axes"),
        (header(1, 0, line("a", (1 << 40, 1 << 40))), "does not fit its file"),
        (header(1, 0, line("a", (0,))), "does not fit its file"),
        (header(1, 0, line("a", (33,), kind=2)), "does not fit its file or its blocks"),
        (header(1, 0, line("a", (8,), offset=64)), "begins at 64 of the data; expected 0"),
        (header(1, 0, line("a", (8,))), "ends beyond the file"),
        (header(2, 0, line("a", (8,)) * 2), "tensor 'a' is there twice"),
        (header(0, 1, string("general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
    ],
)
def test_a_damaged_header(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        GgufFile(tmp_path / "a.gguf")
