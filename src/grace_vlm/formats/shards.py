"""Write safetensors shards tensor by tensor: the header from what is known beforehand, then one tensor at a time.

    8 bytes       length of the header, little-endian
    header        JSON: {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...},
                  padded with spaces so that the data begin at a multiple of 8
    data          the tensors, one after the other, without a gap

The library's ``save_file`` wants a whole shard in memory. Readers view each tensor in place, so it must begin at a
multiple of its element size: those whose bytes are no multiple of 8 come last, larger elements first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.lazy import TensorSpec, ahead, spec_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30
_CHUNK_BYTES = 64 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes that we read and write, by their names in a header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_bytes(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Append the bytes of a tensor, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK_BYTES):
        file.write(flat[start : start + _CHUNK_BYTES].numpy().data)


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
    whole = [name for name, spec in specs.items() if spec.num_bytes % 8 == 0]
    rest = sorted(specs.keys() - set(whole), key=lambda name: (-specs[name].dtype.itemsize, name))
    ordered = {name: specs[name] for name in (*whole, *rest)}
    header = _header(ordered, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in ahead(tensors, ordered):
            spec = ordered[name]
            if (tensor.dtype, tuple(tensor.shape)) != spec:
                raise FormatError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not the {spec.dtype} {spec.shape} of its header"
                )
            write_bytes(file, tensor)


def _split(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    """Consecutive tensors of at most ``max_bytes`` together, but at least one a shard."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.num_bytes
    return shards


def write_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    name_of: Callable[[int, int], str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write ``tensors`` as shards named ``name_of(number from 1, count)``; returns tensor name -> shard name.

    Args:
        tensors: each value is read once, in order but for the last few of a shard; a ``Lazy`` with a ``spec`` is
            never read but one before its turn.
    """
    shards = _split({name: spec_of(tensors, name) for name in tensors}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = name_of(number, len(shards))
        _write_shard(folder / name, tensors, specs)
        weight_map |= dict.fromkeys(specs, name)
    return weight_map


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a model's tensors as ``model.safetensors``, or as numbered shards with an index.

    ``folder`` is a stage: the caller publishes it.
    """

    def name_of(number: int, count: int) -> str:
        return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    weight_map = write_shards(folder, tensors, name_of, max_shard_bytes)
    if len(set(weight_map.values())) > 1:
        total = sum(spec_of(tensors, name).num_bytes for name in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shard_bytes(specs: Iterable[TensorSpec]) -> int:
    """About what tensors take in a file, header included; a little too high."""
    return sum(spec.num_bytes + 256 for spec in specs)
