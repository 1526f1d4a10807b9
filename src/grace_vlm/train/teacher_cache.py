"""The teacher from a disk: what it said about every row, once, in place of its body on the GPU.

    grace teacher cache RECIPE --out CACHE          one pass of the teacher over all rows (cache_build.py)
    model.teacher_cache=CACHE                       a run that reads it; nothing of the teacher is opened but its head

Entries are per row and found by its content (data/row_key.py): any batch composition, packing, order or number of
ranks reads the same ones. What comes back is what the teacher computed in the batches of the build. A hidden state
depends on the batch it was computed in by the rounding of its precision, as it does in the online teacher, which sees
other batches too; relations are FP32 Gram matrices. With ``exact`` a cached run is the online run up to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError

from grace_vlm.checkpoint.manifest import verify_manifest
from grace_vlm.data.collate import Batch
from grace_vlm.errors import CheckpointError, DataError
from grace_vlm.kernels.upload import upload
from grace_vlm.losses.objective import Objective
from grace_vlm.losses.signal import Grams, TeacherSignal
from grace_vlm.models.graphs import GraphMemory
from grace_vlm.models.load import LoadedModel
from grace_vlm.train.cache_identity import read_info, require_made_for
from grace_vlm.train.cache_shards import DamagedEntry, Entry, EntryStore, load_head, raw, remedy
from grace_vlm.train.config import Recipe

READERS = 4
"""Threads that read and check entries; both leave the interpreter lock alone."""


class CachedTeacher:
    """Answers from a cache; the same interface as the online teacher (``train.teacher.Teacher``).

    Args:
        root: the cache. device: where the student computes; its dtype is that of the head and the hidden states.

    Raises:
        CheckpointError: no cache, or a damaged one.
    """

    def __init__(self, root: Path, objective: Objective, device: torch.device, dtype: torch.dtype) -> None:
        self.root, self.objective, self.device, self.dtype = root, objective, device, dtype
        read_info(root)
        self.entries = EntryStore(root)
        verify_manifest(root / "head")
        try:
            self.head = load_head(root).to(device, dtype)
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{root / 'head'} holds no head of a teacher; make the cache anew") from error
        self._readers = ThreadPoolExecutor(max_workers=READERS)

    def keeps(self, name: str) -> bool:
        """True: no picture's pixels are needed."""
        return True

    def compile_layers(self) -> None:
        """There are none."""

    def graph_layers(self, memory: GraphMemory) -> None:
        """There are none."""

    def signals(self, batches: Sequence[Batch], max_tokens: int) -> list[TeacherSignal]:
        """What the teacher said about each batch, on the device, on its way there when this returns.

        Raises:
            DataError: a row that the cache lacks. CheckpointError: a row whose entry is damaged.
        """
        rows = [row for batch in batches for row in zip(batch.shares, batch.sample_ids, strict=True)]
        found = self._readers.map(lambda row: self._read(row[0].key, row[1]), rows)
        return [self._signal(batch, list(itertools.islice(found, len(batch.shares)))) for batch in batches]

    def _read(self, key: bytes | None, name: str) -> Entry:
        assert key is not None, "a row came without the digests of its pictures"
        if key not in self.entries:
            raise DataError(
                f"{self.root} has no entry of row {name!r}: the row is new, or its text, its pictures or how they are "
                f"read changed; add what is missing with grace teacher cache RECIPE --out {self.root}"
            )
        try:
            return self.entries.read(key)
        except DamagedEntry:
            shard = self.entries.shard_of(key)
            raise CheckpointError(f"{shard} is corrupt at the entry of row {name!r}; {remedy(shard)}") from None

    def _signal(self, batch: Batch, entries: list[Entry]) -> TeacherSignal:
        lengths = tuple(itertools.chain.from_iterable(entry.image_tokens for entry in entries))
        assert lengths == batch.image_lengths, "a key is of other pictures"
        assert [len(entry.gate) for entry in entries] == [share.num_supervised for share in batch.shares]
        hidden = self._hidden(entries)
        if self.objective.is_gated:
            gate = self._upload([entry.gate for entry in entries])
        else:
            gate = torch.ones(len(hidden), dtype=torch.float32, device=self.device)
        if self.objective.is_relational:
            relational: torch.Tensor | Grams = Grams(self._upload([entry.grams for entry in entries]))
        else:
            relational = hidden.new_zeros(0, hidden.shape[1])
        return TeacherSignal(hidden, gate, relational, lengths)

    def _hidden(self, entries: list[Entry]) -> torch.Tensor:
        """(n, d) in the run's dtype."""
        stored = self._upload([entry.hidden for entry in entries])
        hidden = stored.view(-1, entries[0].hidden.shape[1])
        scales = [entry.scale for entry in entries if entry.scale is not None]
        if scales:
            hidden = hidden.float() * self._upload(scales).unsqueeze(1)
        return hidden.to(self.dtype)

    def _upload(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The parts end to end on the device, flat: copied once on the host, into memory that no copy waits for."""
        num_bytes = sum(part.nbytes for part in parts)
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda" and num_bytes > 0)
        torch.cat([raw(part) for part in parts], out=host)
        return upload(host, self.device).view(parts[0].dtype)


def open_cached_teacher(recipe: Recipe, student: LoadedModel) -> CachedTeacher:
    """The cache that a recipe names, for its student.

    Raises:
        ConfigError: it is a cache of something else. CheckpointError: none, or a damaged one.
    """
    root = Path(str(recipe.model.teacher_cache))
    require_made_for(root, read_info(root), recipe, student)
    parameter = next(student.model.parameters())
    return CachedTeacher(root, recipe.objective(), parameter.device, parameter.dtype)
