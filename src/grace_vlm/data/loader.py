"""Rows in a seeded order, as batches, with a cursor that resumes exactly.

The order of an epoch is a permutation of *all* rows, good and bad, drawn from (seed, epoch). A bad row is written to
the ledger and leaves a gap; no neighbour takes its place, so the other rows keep their order and their batches
whether it is there or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from grace_vlm.data.collate import Batch, collate
from grace_vlm.data.encode import Encoder, Sample
from grace_vlm.data.ledger import BadRowBudget, Ledger
from grace_vlm.data.pictures import Picture, PictureStore
from grace_vlm.data.rows import Fault, Row, RowFile
from grace_vlm.errors import DataError
from grace_vlm.media.image import LoadedImage

Entry = tuple[Row, Sample, list[Picture]]
"""A good row, encoded, with its pictures."""


class RowReader:
    """Row -> (sample, its pictures), or a ledger line (no ledger: an evaluation, whose budget is 0)."""

    def __init__(
        self,
        rows: RowFile,
        encoder: Encoder,
        pictures: PictureStore,
        ledger: Ledger | None,
        max_bad_fraction: float,
        max_tokens: int,
        samples_kept: int = 0,
        keeps_features: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.rows, self.encoder, self.pictures, self.ledger = rows, encoder, pictures, ledger
        self.samples_kept = samples_kept
        self._samples: dict[int, tuple[Row, Sample]] = {}
        self.budget = BadRowBudget(max_bad_fraction, len(rows), ledger.faults if ledger else ())
        self.max_tokens, self.keeps_features = max_tokens, keeps_features

    def read(self, index: int, *, as_prompt: bool = False) -> Entry | None:
        """One row; None if it is bad: it is then in the ledger, and over budget a ``DataError``."""
        return next(iter(self.read_many([index], as_prompt=as_prompt)), None)

    def read_many(self, indices: Sequence[int], *, as_prompt: bool = False) -> list[Entry]:
        """The good rows among ``indices``, in order; their new pictures are patchified together."""
        rows = [self._samples[i][0] if i in self._samples else self.rows.row(i) for i in indices]
        pictures = self.pictures_of([row for row in rows if isinstance(row, Row)])
        entries = []
        for row in rows:
            entry = row if isinstance(row, Fault) else self._entry(row, pictures, as_prompt)
            if not isinstance(entry, Fault):
                entries.append(entry)
            elif self.ledger is None or self.ledger.add(entry):
                self.budget.charge(entry)
        return entries

    def _entry(self, row: Row, pictures: Mapping[str, Picture | Fault], as_prompt: bool) -> Entry | Fault:
        own = [] if row.image is None else [pictures[row.image]]
        good = [picture for picture in own if isinstance(picture, Picture)]
        for fault in own:
            if isinstance(fault, Fault):
                return dataclasses.replace(fault, row=row.index, id=row.id)
        if row.index in self._samples and not as_prompt:
            return row, self._samples[row.index][1], good
        encode = self.encoder.prompt if as_prompt else self.encoder.encode
        sample = encode(row, [picture.grid for picture in good])
        if sample.num_tokens > self.max_tokens:
            reason = f"{sample.num_tokens} tokens; the limit is {self.max_tokens} (data.max_tokens)"
            return Fault(row.index, row.id, "too_many_tokens", reason)
        if len(self._samples) < self.samples_kept and not as_prompt:
            self._samples[row.index] = (row, sample)
        return row, sample, good

    def pictures_of(self, rows: Sequence[Row]) -> dict[str, Picture | Fault]:
        """By name, the pictures of rows; with pixels, unless the tower's output for them is kept."""
        found: dict[str, Picture | Fault] = {}
        decoded: dict[str, LoadedImage] = {}
        for row in rows:
            if row.image is None or row.image in found or row.image in decoded:
                continue
            picture = self.pictures.find(row.image, with_pixels=not self.keeps_features(row.image))
            loaded = picture or self.rows.load_image(row)
            if isinstance(loaded, LoadedImage):
                decoded[row.image] = loaded
            else:
                found[row.image] = loaded
        for start in range(0, len(decoded), 64):
            chunk = list(decoded.items())[start : start + 64]
            found.update((picture.key, picture) for picture in self.pictures.add_many(chunk))
        return found


class TrainLoader:
    """An endless stream of micro-batches.

    ``state_dict`` holds the epoch and the number of rows taken from its permutation: resume costs nothing.
    """

    def __init__(
        self,
        reader: RowReader,
        micro_batch_size: int,
        seed: int,
        *,
        group_by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.reader, self.micro_batch_size, self.seed = reader, micro_batch_size, seed
        self.group_by_length, self.rank, self.world_size = group_by_length, rank, world_size
        if len(reader.rows) < world_size:
            raise DataError(f"{len(reader.rows)} rows cannot feed {world_size} processes; add rows or use fewer")
        self.epoch, self.cursor = 0, 0
        self._lengths = self._text_lengths() if group_by_length else []
        self._order = self._permutation()

    def _text_lengths(self) -> list[int]:
        """Characters of each row: what rows of one batch should have in common, known without a tokenizer."""
        return [sum(len(turn.text) for turn in getattr(row, "turns", ())) for row in self.reader.rows]

    def _permutation(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(len(self.reader.rows), generator=generator).tolist()
        if not self.group_by_length:
            return order
        # Inside windows of 16 batches rows are sorted by length, then the batches are shuffled again. Rows that
        # complete the batch of the epoch before come first and a short last batch stays last, so that batches never
        # straddle two length groups.
        size = self.micro_batch_size * self.world_size
        begun = -self.epoch * len(order) % size
        batches: list[list[int]] = []
        for start in range(begun, len(order), 16 * size):
            window = sorted(order[start : start + 16 * size], key=lambda index: (self._lengths[index], index))
            batches.extend(window[at : at + size] for at in range(0, len(window), size))
        short = batches.pop() if batches and len(batches[-1]) < size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return order[:begun] + [index for number in shuffled for index in batches[number]] + short

    def _next_index(self) -> int:
        if self.cursor >= len(self._order):
            self.epoch, self.cursor = self.epoch + 1, 0
            self._order = self._permutation()
        self.cursor += 1
        return self._order[self.cursor - 1]

    def next(self) -> Batch:
        """The next micro-batch of this rank; smaller by its bad rows, never empty."""
        share = self.micro_batch_size * self.world_size
        for _ in range(2 * len(self.reader.rows) // share + 2):
            indices = [self._next_index() for _ in range(share)][self.rank :: self.world_size]
            found = self.reader.read_many(indices)
            if found:
                return self._collate(found)
        raise DataError(f"none of the {len(self.reader.rows)} rows can be used; list them with 'grace data check'")

    def _collate(self, found: list[Entry]) -> Batch:
        encoder = self.reader.encoder
        pictures = [picture for _, _, own in found for picture in own]
        lengths = [encoder.adapter.num_visual_tokens(encoder.model, picture.grid) for picture in pictures]
        return collate([sample for _, sample, _ in found], pictures, lengths, encoder.tokenizer.pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = int(state["epoch"]), int(state["cursor"])
        self._order = self._permutation()
