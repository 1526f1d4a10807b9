"""What a teacher said, on a disk: entries of rows in shards that are published whole.

    shards/shard-000000/
      entries.safetensors     of the shard's rows, one after the other:
        key           (rows, 32) U8        data/row_key.py
        checksum      (rows,) I64          CRC-32 of key, counts and the four payloads of the row
        tokens        (rows,) I64          supervised tokens of each
        pictures      (rows,) I64          pictures of each
        image_tokens  (pictures,) I64      visual tokens of each picture
        hidden        (tokens, d)          F32, BF16 or F8_E4M3: last hidden states at supervised positions
        scale         (tokens,) F32        with F8_E4M3: what a token's codes are multiplied by
        gate          (tokens,) F32        always computed, whether a run will use it or not
        grams         (values,) F32        packed triangles (losses/signal.py)
      manifest.json  manifest.sha256       checkpoint/manifest.py

A shard is a folder that appears complete or not at all, so a build that is killed loses what it had not published yet:
at most the shard it was filling and the one on its way to the disk. Readers map the files: what is read of a shard is
what its rows need, and the pages are the system's to drop.

Each entry is checked when it is read. CRC-32 finds every flipped bit and every burst of up to 32, and costs 2.6 ms for
the 13 MB of eight captioned rows where sha256 costs 6.8; whole shards have their sha256 for ``--verify``.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grace_vlm.checkpoint.atomic import publish_folder
from grace_vlm.checkpoint.manifest import is_complete
from grace_vlm.errors import CheckpointError

SHARD_BYTES = 256 << 20
"""A shard is published when it has so many; a few seconds of a teacher's work."""
KEY_BYTES = 32
FILE = "entries.safetensors"
_MANIFEST_ROOM_BYTES = 1 << 16
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


class DamagedEntry(Exception):
    """An entry's checksum is wrong; the reader's caller says of which row."""


@dataclass(frozen=True)
class Entry:
    """What a teacher said about one row, on the host.

    Args:
        hidden: (n, d) FP32, BF16 or E4M3. scale: (n,) FP32 with E4M3, else None. gate: (n,) FP32.
        grams: (values,) FP32, packed triangles of its pictures. image_tokens: visual tokens of each picture.
    """

    hidden: torch.Tensor
    scale: torch.Tensor | None
    gate: torch.Tensor
    grams: torch.Tensor
    image_tokens: tuple[int, ...]

    def payloads(self) -> list[torch.Tensor]:
        """What takes space, in the order of the checksum."""
        return [tensor for tensor in (self.hidden, self.scale, self.gate, self.grams) if tensor is not None]

    @property
    def num_bytes(self) -> int:
        return KEY_BYTES + 8 * (3 + len(self.image_tokens)) + sum(t.nbytes for t in self.payloads())


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, flat."""
    return tensor.reshape(-1).view(torch.uint8)


def checksum(key: bytes, entry: Entry) -> int:
    """CRC-32 of everything in an entry."""
    found = zlib.crc32(key + np.array([len(entry.gate), *entry.image_tokens], dtype="<i8").tobytes())
    for tensor in entry.payloads():
        if tensor.numel():
            found = zlib.crc32(raw(tensor).numpy().data, found)
    return found


def list_shards(root: Path) -> list[Path]:
    """The published shards of a cache, in order."""
    return sorted(path for path in (root / "shards").glob("shard-*") if path.name.removeprefix("shard-").isdigit())


class ShardWriter:
    """Collects entries and publishes a shard whenever there are enough, in a thread of its own.

    Use as a context manager; leaving it without an error publishes what is left.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        last = [int(path.name.removeprefix("shard-")) for path in list_shards(root)][-1:]
        self._number = last[0] + 1 if last else 0
        self._entries: list[tuple[bytes, Entry]] = []
        self._held_bytes = 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._publishing: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._wait()
        finally:
            self._pool.shutdown()

    def add(self, key: bytes, entry: Entry) -> None:
        """Keep an entry; ``CheckpointError`` if the disk refused an earlier shard."""
        self._entries.append((key, entry))
        self._held_bytes += entry.num_bytes
        if self._held_bytes >= SHARD_BYTES:
            self._flush()

    def _wait(self) -> None:
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result()

    def _flush(self) -> None:
        # Two shards at most are in memory: the next one waits until this one is on the disk.
        self._wait()
        if self._entries:
            folder = self.root / "shards" / f"shard-{self._number:06d}"
            self._publishing = self._pool.submit(_publish, folder, self._entries, self._held_bytes)
            self._number += 1
        self._entries, self._held_bytes = [], 0


def _publish(folder: Path, entries: Sequence[tuple[bytes, Entry]], num_bytes: int) -> None:
    rows = [entry for _, entry in entries]
    counts = {
        "checksum": [checksum(key, entry) for key, entry in entries],
        "tokens": [len(entry.gate) for entry in rows],
        "pictures": [len(entry.image_tokens) for entry in rows],
        "image_tokens": list(itertools.chain.from_iterable(entry.image_tokens for entry in rows)),
    }
    tensors = {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in counts.items()}
    keys = np.frombuffer(b"".join(key for key, _ in entries), np.uint8).reshape(-1, KEY_BYTES)
    tensors["key"] = torch.from_numpy(keys.copy())
    # Joined as bytes: not every operation knows FP8.
    hidden = torch.cat([raw(entry.hidden) for entry in rows]).view(rows[0].hidden.dtype)
    tensors["hidden"] = hidden.view(-1, rows[0].hidden.shape[1])
    scales = [entry.scale for entry in rows if entry.scale is not None]
    if scales:
        tensors["scale"] = torch.cat(scales)
    tensors["gate"] = torch.cat([entry.gate for entry in rows])
    tensors["grams"] = torch.cat([entry.grams for entry in rows])
    with publish_folder(folder, needed_bytes=num_bytes + _MANIFEST_ROOM_BYTES) as stage:
        save_file(tensors, stage / FILE)


class Shard:
    """One published shard, mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = _read_index(folder / FILE)
            self._header = _read_header(folder / FILE)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} is no readable shard: {error}; delete it and make it again") from error
        tokens, pictures = self._index["tokens"], self._index["pictures"]
        image_tokens = self._index["image_tokens"]
        self._token_at = np.concatenate([[0], tokens.cumsum()])
        self._picture_at = np.concatenate([[0], pictures.cumsum()])
        self._gram_at = np.concatenate([[0], (image_tokens * (image_tokens + 1) // 2).cumsum()])
        if any((part < 0).any() for part in (tokens, pictures, image_tokens)) or not (
            self._token_at[-1] == self._header["gate"][3] == self._header["hidden"][3]
            and self._picture_at[-1] == len(image_tokens)
            and self._gram_at[-1] == self._header["grams"][3]
        ):
            raise CheckpointError(f"{folder} is corrupt: its counts are not those of its values; {remedy(folder)}")
        self._bytes: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._index["tokens"])

    @property
    def num_tokens(self) -> int:
        """Supervised tokens of all rows."""
        return int(self._token_at[-1])

    def row_keys(self) -> Iterator[bytes]:
        """The keys of the rows in order."""
        return (key.tobytes() for key in self._index["key"])

    def _slice(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows ``first`` to ``last`` of a payload, in the mapped file."""
        if self._bytes is None:
            self._bytes = torch.from_numpy(np.memmap(self.folder / FILE, np.uint8, mode="c"))
        dtype, width, begin, _ = self._header[name]
        size = width * dtype.itemsize
        found = self._bytes[begin + first * size : begin + last * size]
        # An empty slice may begin anywhere; a view of another dtype may not.
        flat = found.view(dtype) if len(found) else torch.empty(0, dtype=dtype)
        return flat.view(-1, width) if name == "hidden" else flat

    def read(self, number: int) -> Entry:
        """Entry ``number``; ``DamagedEntry`` if its bytes are not those that were written."""
        first, last = (int(self._token_at[number + i]) for i in (0, 1))
        left, right = (int(self._picture_at[number + i]) for i in (0, 1))
        entry = Entry(
            self._slice("hidden", first, last),
            self._slice("scale", first, last) if "scale" in self._header else None,
            self._slice("gate", first, last),
            self._slice("grams", int(self._gram_at[left]), int(self._gram_at[right])),
            tuple(self._index["image_tokens"][left:right].tolist()),
        )
        if checksum(self._index["key"][number].tobytes(), entry) != self._index["checksum"][number]:
            raise DamagedEntry
        return entry


def _read_index(path: Path) -> dict[str, np.ndarray]:
    """The small tensors of a shard. Opening it lets the library judge the whole header."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in ("key", "checksum", "tokens", "pictures", "image_tokens")}


def _read_header(path: Path) -> dict[str, tuple[torch.dtype, int, int, int]]:
    """(dtype, width, first byte, rows) of each payload of a file whose header was found sound."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {
        name: (
            _DTYPES[header[name]["dtype"]],
            header[name]["shape"][1] if name == "hidden" else 1,
            8 + length + header[name]["data_offsets"][0],
            header[name]["shape"][0],
        )
        for name in ("hidden", "scale", "gate", "grams")
        if name in header
    }


class EntryStore:
    """The entries of all shards of a cache, by key.

    Raises:
        CheckpointError: a shard is incomplete or no shard.
    """

    def __init__(self, root: Path) -> None:
        self.shards: list[Shard] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        for number, folder in enumerate(list_shards(root)):
            if not is_complete(folder):
                raise CheckpointError(f"{folder} is damaged: its files are not those of its manifest; {remedy(folder)}")
            shard = Shard(folder)
            self.shards.append(shard)
            self._place.update((key, (number, entry)) for entry, key in enumerate(shard.row_keys()))

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    @property
    def num_tokens(self) -> int:
        """Supervised tokens of all entries."""
        return sum(shard.num_tokens for shard in self.shards)

    def shard_of(self, key: bytes) -> Path:
        """The folder that holds an entry."""
        return self.shards[self._place[key][0]].folder

    def read(self, key: bytes) -> Entry:
        """``KeyError`` without such an entry, ``DamagedEntry`` if it is not what was written."""
        shard, number = self._place[key]
        return self.shards[shard].read(number)


def remedy(shard: Path) -> str:
    """What to do about a bad shard."""
    return f"delete {shard} and run grace teacher cache again, which makes its rows anew"


def load_head(root: Path) -> torch.Tensor:
    """(V_t, d_t) the teacher's head, as it was computed with."""
    return load_file(root / "head" / "head.safetensors")["head"]
