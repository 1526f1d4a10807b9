"""Tensors of a folder of safetensors shards, one at a time, by name.

A shard name is a path that a stranger wrote: it must be a bare file name, and the file must really lie in the folder
(no symbolic link out of it). The index and the shards must list the same tensors. Nothing is read but headers until a
tensor is asked for, so that a model larger than memory can be compared and converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import FormatError
from grace_vlm.formats.lazy import Lazy, TensorSpec
from grace_vlm.formats.shards import DTYPES, INDEX, WEIGHTS

_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, OverflowError)
_SHARD = re.compile(r"[A-Za-z0-9._-]+\.safetensors")


def inside(path: Path, model: Path | None = None) -> bool:
    """Whether the file that ``path`` leads to lies in its model folder, or in the hub cache that has it as a snapshot.

    The cache keeps the files of ``models--X/snapshots/Y/`` in ``models--X/blobs/`` and links them.

    Args:
        model: the model folder, where the file lies deeper in it.
    """
    try:
        folder, target = (model or path.parent).resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    return target.is_relative_to(folder) or target.parent == cache


def require_inside(path: Path, model: Path | None = None) -> Path:
    """``path``, if it is ``inside``; else ``FormatError``."""
    if not inside(path, model):
        raise FormatError(f"{path} lies outside its folder (a symbolic link); copy the file there")
    return path


def read_inside(model: Path, name: str) -> dict[str, Any]:
    """The JSON object in file ``name`` of a model folder; ``FormatError`` if it is none, or lies elsewhere."""
    return read_object(require_inside(model / name, model), FormatError)


def check_shard(folder: Path, name: Any, model: Path | None = None) -> Path:
    """The path of shard ``name`` of ``folder``; ``FormatError`` if it is not a plain file inside (of ``model``)."""
    if not isinstance(name, str) or not _SHARD.fullmatch(name):
        raise FormatError(f"{folder} names a shard {name!r}; expected a bare file name like {WEIGHTS}")
    path = require_inside(folder / name, model)
    if not path.is_file():
        raise FormatError(f"{path} is missing; download or copy the folder again")
    return path


class _Place(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def _places(path: Path) -> dict[str, _Place]:
    """The tensors of a shard, after the library found its header sound: sizes, offsets, no gap, no overlap."""
    try:
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except _UNREADABLE as error:
        raise FormatError(f"{path} is no readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: _Place(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of some shards as a read-only mapping; each access reads that tensor from the disk.

    Read and not mapped: a mapped file's pages count as this process's memory for as long as it is open.
    """

    def __init__(self, shards: Iterable[Path]) -> None:
        self._places: dict[str, _Place] = {}
        for path in shards:
            found = _places(path)
            twice = next((name for name in found if name in self._places), None)
            if twice is not None:
                raise FormatError(f"tensor {twice} is in two shards of {path.parent}; expected one of each")
            self._places.update(found)

    def __getitem__(self, name: str) -> torch.Tensor:
        spec, place = self.spec(name), self._places[name]
        flat = torch.empty(spec.num_bytes, dtype=torch.uint8)
        try:
            with open(place.path, "rb") as file:
                file.seek(place.offset)
                num_read = file.readinto(flat.numpy().data) if spec.num_bytes else 0
        except OSError as error:
            raise FormatError(f"tensor {name} of {place.path} cannot be read: {error.strerror}") from error
        if num_read != spec.num_bytes:
            raise FormatError(f"{place.path} became shorter while it was read; copy the folder again")
        return flat.view(spec.dtype).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header, without reading the tensor."""
        return self.spec(name).shape

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, from the header."""
        place = self._places[name]
        if place.dtype not in DTYPES:
            raise FormatError(f"tensor {name} has dtype {place.dtype}; expected one of {', '.join(DTYPES)}")
        return TensorSpec(DTYPES[place.dtype], place.shape)

    def only(self, names: Iterable[str]) -> Lazy[torch.Tensor]:
        """Some of the tensors."""
        return Lazy(names, self.__getitem__, self.spec)


def open_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face folder: ``model.safetensors``, or the shards of its index."""
    if not (folder / INDEX).is_file():
        return Weights([check_shard(folder, WEIGHTS)])
    weight_map = read_inside(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{folder / INDEX} has no weight_map; expected tensor name -> shard name")
    for name in weight_map.values():
        check_shard(folder, name)
    weights = Weights(folder / name for name in sorted(set(weight_map.values())))
    if weights.keys() != weight_map.keys():
        odd = min(weights.keys() ^ weight_map.keys())
        where = "its shards hold" if odd in weights else "its index lists"
        raise FormatError(f"{folder}: only {where} tensor {odd}; index and shards must agree")
    return weights


def iter_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight of a folder, one in memory at a time."""
    yield from open_weights(folder).items()


def linears_among(weights: Weights, names: Iterable[str]) -> tuple[str, ...]:
    """The modules whose ``.weight`` looks like a linear's: two axes, and no embedding."""
    matrices = (n for n in names if n.endswith(".weight") and len(weights.shape(n)) == 2)
    return tuple(n.removesuffix(".weight") for n in matrices if "embed" not in n)


def weight_bytes(folder: Path) -> int:
    """Bytes of weights on the disk: every safetensors, .bin and GGUF file below the folder."""
    suffixes = (".safetensors", ".bin", ".gguf")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
