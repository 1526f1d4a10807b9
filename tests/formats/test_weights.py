"""Shards: names that are paths, indexes that lie, tensors one at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import FormatError
from grace_vlm.formats.folder import ModelFolder
from grace_vlm.formats.gguf_file import GgufFile
from grace_vlm.formats.shards import INDEX, write_weights
from grace_vlm.formats.weights import iter_weights, linears_among, open_weights


def tensors() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.full((4, 4), float(i)) for i in range(7)} | {"norm.weight": torch.ones(4)}


@pytest.mark.parametrize(("max_shard_bytes", "num_shards"), [(1 << 30, 1), (128, 4), (64, 8), (1, 8), (150, 4)])
def test_round_trip_through_any_number_of_shards(tmp_path: Path, max_shard_bytes: int, num_shards: int) -> None:
    write_weights(tmp_path, tensors(), max_shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == num_shards
    assert files[0] == ("model.safetensors" if num_shards == 1 else f"model-00001-of-{num_shards:05d}.safetensors")
    found = dict(iter_weights(tmp_path))
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    weights = open_weights(tmp_path)
    assert weights.shape("layer.3.weight") == (4, 4)
    assert set(linears_among(weights, weights)) == {f"layer.{i}" for i in range(7)}
    if num_shards > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == 7 * 64 + 16
        assert index["weight_map"].keys() == tensors().keys()


HOSTILE = [
    "../outside.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..\\x.safetensors",
    "x.bin",
    "model.safetensors\n",
    "",
    "\x00.safetensors",
    7,
    None,
    ["model.safetensors"],
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shard_name_that_is_a_path_is_refused(tmp_path: Path, name: object) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match=r"names a shard .*; expected a bare file name like") as caught:
        open_weights(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(FormatError, match="lies outside its folder"):
        open_weights(folder)


def sharded(folder: Path) -> Path:
    write_weights(folder, tensors(), 128)
    return folder


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    index = json.loads((sharded(tmp_path) / INDEX).read_text())
    for change, message in (
        (lambda m: m.pop("layer.3.weight"), "only its shards hold tensor layer.3.weight"),
        (lambda m: m.update(ghost="model-00001-of-00004.safetensors"), "only its index lists tensor ghost"),
        (lambda m: m.update(ghost="model-00009-of-00004.safetensors"), "model-00009-of-00004.safetensors is missing"),
        (lambda m: m.clear(), "has no weight_map"),
    ):
        weight_map = dict(index["weight_map"])
        change(weight_map)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match=message):
            open_weights(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"layer.0.weight": torch.ones(1)}, tmp_path / "model-00004-of-00004.safetensors")
    with pytest.raises(FormatError, match=r"tensor layer\.0\.weight is in two shards"):
        open_weights(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, cut: int) -> None:
    write_weights(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    os.truncate(path, cut if cut >= 0 else path.stat().st_size - 1)
    with pytest.raises(FormatError, match="is no readable safetensors file"):
        open_weights(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"model\.safetensors is missing; download or copy the folder again"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        "[]",
        "{",
        '{"a": NaN}',
        '{"weight_map": {"a": "model.safetensors"}, "b": 1e999}',
        '{"weight_map": {"a": "model.safetensors"}, "b": -1e999}',
        "[" * 100_000,
        '{"weight_map": {"a": ' + "[" * 101 + "]" * 101 + "}}",
        '{"weight_map": {"\\ud800": "model.safetensors"}}',
    ],
)
def test_an_index_that_is_no_plain_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError) as caught:
        open_weights(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert "is no usable JSON" in str(caught.value) or "holds a JSON list" in str(caught.value)


def test_nesting_that_configurations_have_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ' + "[" * 90 + "]" * 90 + ', "b": "\\ud83d\\ude00"}')
    assert read_object(tmp_path / "x.json")["b"] == "\U0001f600"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write_weights(tmp_path, tensors())
    for name in ("config.json", "model.gguf"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(FormatError, match=r"config\.json is no usable JSON: it is no plain file"):
        ModelFolder().read(tmp_path)
    with pytest.raises(FormatError, match=r"model\.gguf is no plain file; expected a GGUF file"):
        GgufFile(tmp_path / "model.gguf")


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(FormatError, match="lies outside its folder"):
        open_weights(tmp_path)
