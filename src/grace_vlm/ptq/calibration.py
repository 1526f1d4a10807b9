"""Rows of a file as forwards to calibrate on: LLaVA rows, with pictures or of text only.

Rows are drawn by a seed and laid end to end, so there is no padding to leave out. The vision tower, which is not
quantized here, looks at each picture once; what it says is kept (FP32 (patches, d_vision) and DeepStack a picture),
besides what ``replay.py`` keeps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from grace_vlm.data.collate import collate
from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.reader import Entry, Preparer, RowReader
from grace_vlm.data.rows import RowFile
from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import layer_names
from grace_vlm.models.load import LoadedModel
from grace_vlm.ptq.replay import Forward, Replay

BATCH_TOKENS = 2048
"""A batch ends before the row that would exceed it."""
MAX_ROW_TOKENS = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """Which rows to calibrate on, and where.

    Args:
        path: file of rows. images: root of their pictures; None is the file's folder.
        num_rows: how many to draw (all, if there are fewer). seed: of the draw.
        device: auto, cpu or cuda.
    """

    path: Path
    images: Path | None = None
    num_rows: int = 128
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(f"num-rows is {self.num_rows}; at least 1 is needed to calibrate on")


def calibration_entries(loaded: LoadedModel, calibration: Calibration) -> list[Entry]:
    """The rows in a seeded order, encoded with their pictures.

    Raises:
        DataError: no such file, no row, or one that cannot be used.
    """
    rows = RowFile(calibration.path, calibration.images)
    config = loaded.model.config
    pictures = PictureStore(patchify_of(loaded.adapter, config, loaded.processor))
    encoder = Encoder(loaded.processor, loaded.adapter, config)
    reader = RowReader(Preparer(rows, encoder, pictures, MAX_ROW_TOKENS), ledger=None, max_bad_fraction=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(calibration.seed))
    return reader.read_many(order[: calibration.num_rows].tolist())


@torch.no_grad()
def calibration_replay(loaded: LoadedModel, entries: list[Entry]) -> Replay:
    """The decoder's layers on the rows, by the adapter's own forward."""
    batches: list[list[Entry]] = []
    held = BATCH_TOKENS
    for entry in entries:
        held += entry[1].num_tokens
        if held > BATCH_TOKENS:
            batches.append([])
            held = entry[1].num_tokens
        batches[-1].append(entry)
    return Replay(
        loaded.model, layer_names(loaded.model, loaded.adapter), [_forward(loaded, batch) for batch in batches]
    )


def _forward(loaded: LoadedModel, entries: list[Entry]) -> Forward:
    adapter, model = loaded.adapter, loaded.model
    pictures = [picture for _, _, own in entries for picture in own]
    lengths = [adapter.num_visual_tokens(model.config, picture.grid) for picture in pictures]
    samples = [sample for _, sample, _ in entries]
    # The pad token is never written: packed rows have no padding, and a tokenizer need not have one.
    batch = collate(samples, pictures, lengths, 0, "packed").to(next(model.parameters()).device)
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    vision = adapter.tower(model, pixels, [picture.grid for picture in pictures]) if pictures else []
    return functools.partial(
        adapter.decode, model, batch.input_ids, batch.position_ids, vision, segments=batch.segments
    )
