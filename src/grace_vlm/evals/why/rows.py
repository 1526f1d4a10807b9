"""Rows of a file as batches to look into: drawn by a seed, laid end to end, read a few at a time.

A batch ends before the row that would exceed ``BATCH_TOKENS``, so memory hangs on the longest row and never on how many
rows there are. Rows, labels and pictures are those of training: the whole conversation, supervised at its answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from grace_vlm.data.collate import Batch, collate
from grace_vlm.data.encode import Encoder
from grace_vlm.data.ledger import EVALUATION_MAX_BAD_FRACTION
from grace_vlm.data.pictures import PictureStore, largest_area, patchify_of
from grace_vlm.data.reader import Entry, Preparer, RowReader
from grace_vlm.data.rows import RowFile
from grace_vlm.errors import ConfigError
from grace_vlm.models.load import LoadedModel

BATCH_TOKENS = 2048
PICTURE_PIXELS = 448 * 448
"""The largest area of a picture in training (196 visual tokens of Qwen3-VL): a Gram matrix has their square."""
_READ_ROWS = 64
_MAX_ROW_TOKENS = 1 << 20


@dataclass(frozen=True)
class Sampled:
    """Which rows.

    Args:
        path: file of rows. images: root of their pictures; None is the file's folder.
        num_rows: how many to draw (all, if there are fewer). seed: of the draw.
        max_pixels: area that larger pictures are shrunk to; None: ``PICTURE_PIXELS``, if the processor has an area.
    """

    path: Path
    images: Path | None = None
    num_rows: int = 512
    seed: int = 0
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(f"--limit is {self.num_rows}; at least 1 row is needed to look at")


class SampledRows:
    """The batches of ``sampled`` for a model and others of its family, which see the same tokens.

    Raises:
        DataError: no such file, no row; from ``batches``, a row that cannot be used.
    """

    def __init__(self, loaded: LoadedModel, sampled: Sampled) -> None:
        rows = RowFile(sampled.path, sampled.images)
        config, own = loaded.model.config, largest_area(loaded.processor)
        limit = min(own, PICTURE_PIXELS) if sampled.max_pixels is None and own is not None else sampled.max_pixels
        patchify = patchify_of(loaded.adapter, config, loaded.processor, max_pixels=limit)
        self._encoder = Encoder(loaded.processor, loaded.adapter, config)
        preparer = Preparer(rows, self._encoder, PictureStore(patchify), _MAX_ROW_TOKENS)
        self._reader = RowReader(preparer, ledger=None, max_bad_fraction=EVALUATION_MAX_BAD_FRACTION)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(sampled.seed))
        self.indices: list[int] = order[: sampled.num_rows].tolist()

    def batches(self) -> Iterator[Batch]:
        """Packed, on the host, in the order of the draw."""
        held: list[Entry] = []
        num_tokens = 0
        for start in range(0, len(self.indices), _READ_ROWS):
            for entry in self._reader.read_many(self.indices[start : start + _READ_ROWS]):
                if held and num_tokens + entry[1].num_tokens > BATCH_TOKENS:
                    yield self._batch(held)
                    held, num_tokens = [], 0
                held.append(entry)
                num_tokens += entry[1].num_tokens
        if held:
            yield self._batch(held)

    def _batch(self, entries: list[Entry]) -> Batch:
        encoder = self._encoder
        pictures = [picture for _, _, own in entries for picture in own]
        lengths = [encoder.adapter.num_visual_tokens(encoder.config, picture.grid) for picture in pictures]
        # The pad token is never written: packed rows have no padding, and a tokenizer need not have one.
        return collate([sample for _, sample, _ in entries], pictures, lengths, 0, "packed")
