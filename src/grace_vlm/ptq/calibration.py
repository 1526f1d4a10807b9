"""Rows of a file as forwards to calibrate on: our LLaVA rows, with pictures or of text only.

Rows are drawn by a seed and laid end to end, so there is no padding to leave out. The vision tower, which is never
quantized here, looks at each picture once; what it says is kept (16-bit (patches, d_vision) and DeepStack a picture on
a GPU, 32-bit on a CPU), besides what ``replay.py`` keeps.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

from grace_vlm.data.collate import collate
from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.reader import Entry, Preparer, RowReader
from grace_vlm.data.rows import RowFile
from grace_vlm.errors import ConfigError, DataError
from grace_vlm.models.load import LoadedModel
from grace_vlm.ptq.replay import Forward

BATCH_TOKENS = 2048
"""A batch ends before the row that would exceed it."""


def calibration_entries(
    loaded: LoadedModel, path: Path, root: Path | None = None, num_rows: int = 128, seed: int = 0
) -> list[Entry]:
    """``num_rows`` rows of a file in a seeded order (all, if there are fewer), encoded with their pictures.

    Raises:
        ConfigError: ``num_rows`` is not positive. DataError: no such file, no row, or one that cannot be used.
    """
    if num_rows < 1:
        raise ConfigError(f"num-rows is {num_rows}; at least 1 is needed to calibrate on")
    rows = RowFile(path, root)
    if not len(rows):
        raise DataError(f"{path} has no row; there is nothing to calibrate on")
    config = loaded.model.config
    pictures = PictureStore(patchify_of(loaded.adapter, config, loaded.processor))
    encoder = Encoder(loaded.processor, loaded.adapter, config)
    reader = RowReader(Preparer(rows, encoder, pictures, max_tokens=1 << 20), None, 0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return reader.read_many(order[:num_rows].tolist())


@torch.no_grad()
def calibration_forwards(loaded: LoadedModel, entries: list[Entry]) -> list[Forward]:
    """The adapter's own forward on each batch of rows."""
    batches: list[list[Entry]] = []
    for entry in entries:
        held = sum(sample.num_tokens for _, sample, _ in batches[-1]) if batches else BATCH_TOKENS
        if held + entry[1].num_tokens > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(entry)
    return [_forward(loaded, batch) for batch in batches]


def _forward(loaded: LoadedModel, entries: list[Entry]) -> Forward:
    adapter, model = loaded.adapter, loaded.model
    device = next(model.parameters()).device
    pictures = [picture for _, _, own in entries for picture in own]
    lengths = [adapter.num_visual_tokens(model.config, picture.grid) for picture in pictures]
    pad = loaded.processor.tokenizer.pad_token_id
    batch = collate([sample for _, sample, _ in entries], pictures, lengths, pad, "packed").to(device)
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    vision = adapter.tower(model, pixels, [picture.grid for picture in pictures]) if pictures else []
    return functools.partial(
        adapter.decode, model, batch.input_ids, batch.position_ids, vision, segments=batch.segments
    )


def layer_names(loaded: LoadedModel) -> list[str]:
    """Module names of the decoder's layers, in order: those that hold the linears of the language model."""
    pattern = loaded.adapter.parts["language"]
    names = [name for name, _ in loaded.model.named_modules() if re.fullmatch(pattern, name)]
    return list(dict.fromkeys(re.sub(r"(\.layers\.\d+)\..*", r"\1", name) for name in names))
