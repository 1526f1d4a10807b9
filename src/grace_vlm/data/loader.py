"""Rows in a seeded order, as micro-batches, with a cursor that resumes exactly.

The order of an epoch is a permutation of *all* rows, good and bad, drawn from (seed, epoch). A bad row is written to
the ledger and leaves a gap; no neighbour takes its place, so the other rows keep their order and their batches
whether it is there or not.

A micro-batch is ``micro_batch_size`` rows padded to one length, or, packed, rows laid end to end: as many as the limits
on rows and tokens allow, which leaves no padding at all. The cursor counts the rows that went into batches, so a run
that is resumed inside an epoch goes on with the next row, packed or not, for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from grace_vlm.data.collate import Batch, Layout, collate
from grace_vlm.data.reader import Entry, RowReader
from grace_vlm.data.workers import Position, Result, prepared, start_server
from grace_vlm.errors import DataError

_PACKED_READ = 8
"""Rows that a worker prepares at a time where batches have no fixed number of rows."""


class TrainLoader:
    """An endless stream of micro-batches.

    ``state_dict`` holds the epoch and the number of rows taken from its permutation: resume costs nothing.

    Args:
        micro_batch_size: rows of a micro-batch; of a packed one with a limit on tokens, the most rows.
        packed: lay samples end to end instead of padding them.
        max_batch_tokens: a packed micro-batch ends before the row that would exceed it; None: no limit.
        num_workers: processes that prepare rows ahead; 0 prepares them here, when they are needed.
    """

    def __init__(
        self,
        reader: RowReader,
        micro_batch_size: int,
        seed: int,
        *,
        group_by_length: bool = False,
        packed: bool = False,
        max_batch_tokens: int | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.reader, self.rows = reader, reader.preparer.rows
        self.micro_batch_size, self.seed = micro_batch_size, seed
        self.packed, self.max_batch_tokens, self.num_workers = packed, max_batch_tokens, num_workers
        self.group_by_length, self.rank, self.world_size = group_by_length, rank, world_size
        if len(self.rows) < world_size:
            raise DataError(f"{len(self.rows)} rows cannot feed {world_size} processes; add rows or use fewer")
        self.epoch, self.cursor = 0, 0
        if num_workers:
            start_server(reader.preparer)
        self._lengths = self.rows.text_lengths if group_by_length else ()
        self._order_of: tuple[int, list[int]] | None = None
        self._stream: Iterator[Result] | None = None
        self._ahead: tuple[Position, Entry] | None = None

    def _order(self, epoch: int) -> list[int]:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, self._permutation(epoch))
        return self._order_of[1]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.rows), generator=generator).tolist()
        if not self.group_by_length:
            return order
        # Inside windows of 16 batches rows are sorted by length, then the batches are shuffled again. Rows that
        # complete the batch of the epoch before come first and a short last batch stays last, so that batches never
        # straddle two length groups.
        size = self.micro_batch_size * self.world_size
        begun = -epoch * len(order) % size
        batches: list[list[int]] = []
        for start in range(begun, len(order), 16 * size):
            window = sorted(order[start : start + 16 * size], key=lambda index: (self._lengths[index], index))
            batches.extend(window[at : at + size] for at in range(0, len(window), size))
        short = batches.pop() if batches and len(batches[-1]) < size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return order[:begun] + [index for number in shuffled for index in batches[number]] + short

    def _chunks(self) -> Iterator[list[tuple[Position, int]]]:
        """Rows of this rank from the cursor on, without end: (position after the row, row number)."""
        epoch, cursor = self.epoch, self.cursor
        size = _PACKED_READ if self.max_batch_tokens is not None else self.micro_batch_size
        while True:
            share: list[tuple[Position, int]] = []
            for _ in range(size * self.world_size):
                if cursor >= len(self.rows):
                    epoch, cursor = epoch + 1, 0
                cursor += 1
                share.append(((epoch, cursor), self._order(epoch)[cursor - 1]))
            last = share[-1][0]
            if self.max_batch_tokens is not None:
                # Ranks go at their own pace, each through its part of every epoch.
                yield [(place, index) for place, index in share if (place[1] - 1) % self.world_size == self.rank]
                continue
            own = share[self.rank :: self.world_size]
            # Ranks that take whole shares stand at the same place when each has taken its part.
            yield [(last if number == len(own) - 1 else place, index) for number, (place, index) in enumerate(own)]

    def _next(self) -> Result:
        if self._stream is None:
            self._stream = prepared(self.reader.preparer, self._chunks(), self.num_workers)
        return next(self._stream)

    def next(self) -> Batch:
        """The next micro-batch of this rank; smaller by its bad rows, never empty."""
        found = self._next_packed() if self.max_batch_tokens is not None else self._next_share()
        encoder = self.reader.preparer.encoder
        pictures = [picture for _, _, own in found for picture in own]
        lengths = [encoder.adapter.num_visual_tokens(encoder.config, picture.grid) for picture in pictures]
        layout: Layout = "packed" if self.packed else "right"
        return collate([sample for _, sample, _ in found], pictures, lengths, encoder.tokenizer.pad_token_id, layout)

    def _next_share(self) -> list[Entry]:
        for _ in range(2 * len(self.rows) // (self.micro_batch_size * self.world_size) + 2):
            found = []
            for _ in range(self.micro_batch_size):
                (self.epoch, self.cursor), result = self._next()
                found.append(self.reader.admit(result))
            if good := [entry for entry in found if entry is not None]:
                return good
        raise self._nothing_good()

    def _next_packed(self) -> list[Entry]:
        assert self.max_batch_tokens is not None
        batch: list[Entry] = []
        num_tokens = num_bad = 0
        while len(batch) < self.micro_batch_size:
            if self._ahead is None:
                place, result = self._next()
                entry = self.reader.admit(result)
                if entry is None:
                    self.epoch, self.cursor = place
                    num_bad += 1
                    if num_bad > 2 * len(self.rows):
                        raise self._nothing_good()
                    continue
                self._ahead = (place, entry)
            place, entry = self._ahead
            if batch and num_tokens + entry[1].num_tokens > self.max_batch_tokens:
                break
            # Only now is the row taken: one that did not fit is read again by a run that resumes here.
            self._ahead = None
            self.epoch, self.cursor = place
            batch.append(entry)
            num_tokens += entry[1].num_tokens
        return batch

    def _nothing_good(self) -> DataError:
        return DataError(f"none of the {len(self.rows)} rows can be used; list them with 'grace data check'")

    def close(self) -> None:
        """End the workers, if there are any."""
        self._stream = self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.epoch, self.cursor = int(state["epoch"]), int(state["cursor"])
