"""A row's key is its content as a model gets it: nothing else changes it, and each part of it does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import encoder

from grace_vlm.data.collate import Batch, RowShare, collate, merge
from grace_vlm.data.encode import Encoder, Sample
from grace_vlm.data.pictures import Picture, PictureStore, patchify_of
from grace_vlm.data.row_key import pixels_digest, row_key
from grace_vlm.media.image import LoadedImage, load_image

__all__ = ["encoder"]
GRID = (1, 4, 4)


def sample(**changes: Any) -> Sample:
    ids = np.arange(6)
    labels = np.array([-100, -100, -100, 3, 4, 5])
    found = Sample(0, "a", ids, labels, np.stack([ids] * 3), ("x.png", "y.png"), np.array([1, 2]))
    return dataclasses.replace(found, **changes)


def test_every_part_of_a_row_is_in_its_key() -> None:
    keys = {
        row_key(sample(), [b"x" * 32, b"y" * 32]),
        row_key(sample(), [b"y" * 32, b"x" * 32]),
        row_key(sample(), [b"x" * 32]),
        row_key(sample(input_ids=np.array([0, 1, 2, 3, 4, 6])), [b"x" * 32, b"y" * 32]),
        row_key(sample(labels=np.array([-100, -100, 2, 3, 4, 5])), [b"x" * 32, b"y" * 32]),
        row_key(sample(positions=np.stack([np.arange(6)] * 2 + [np.zeros(6, int)])), [b"x" * 32, b"y" * 32]),
    }
    assert len(keys) == 6
    assert all(len(key) == 32 for key in keys)


def test_names_and_number_types_are_not() -> None:
    renamed = sample(row_index=9, row_id="b", images=("z.png", "y.png"), input_ids=np.arange(6, dtype=np.int32))
    assert row_key(renamed, [b"x" * 32]) == row_key(sample(), [b"x" * 32])


def test_every_bit_of_a_picture_is_in_its_digest() -> None:
    pixels = torch.linspace(-2, 2, 48).view(16, 3)
    changed = pixels.clone()
    changed.view(torch.int32)[3, 1] ^= 1
    found = {
        pixels_digest(GRID, pixels),
        pixels_digest((1, 2, 8), pixels),
        pixels_digest(GRID, pixels.view(8, 6)),
        pixels_digest(GRID, pixels.bfloat16()),
        pixels_digest(GRID, changed),
    }
    assert len(found) == 5
    assert pixels_digest(GRID, pixels.t().contiguous().t()) == pixels_digest(GRID, pixels)


def pictures(folder: Path) -> list[tuple[str, LoadedImage]]:
    """Of two sizes; the processor stacks those of one."""
    found = []
    for number, size in enumerate([(128, 128), (160, 128), (128, 128), (160, 128)]):
        values = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(values).save(path)
        found.append((path.name, load_image(path)))
    return found


@pytest.mark.parametrize("budget", [0, 1 << 22])
def test_a_picture_has_one_digest_however_it_comes(tmp_path: Path, encoder: Encoder, budget: int) -> None:
    """Alone or stacked with others, kept or made again, with its pixels or without them."""
    patchify = patchify_of(encoder.adapter, encoder.config, encoder.processor)
    decoded = pictures(tmp_path)
    together = PictureStore(patchify, budget, torch.device("cpu"), with_digests=True)
    alone = PictureStore(patchify, with_digests=True)
    digests = [picture.digest for picture in together.add_many(decoded)]
    assert digests == [alone.add(*one).digest for one in decoded]
    assert len({*digests}) == 4
    for (name, _), digest in zip(decoded, digests, strict=True):
        without = together.find(name, with_pixels=False)
        assert without is not None
        assert without.pixels is None
        assert without.digest == digest
        kept = together.find(name)
        assert (kept is not None) == bool(budget)
        assert kept is None or kept.digest == digest


def test_nothing_is_hashed_where_nobody_asks(tmp_path: Path, encoder: Encoder) -> None:
    store = PictureStore(patchify_of(encoder.adapter, encoder.config, encoder.processor))
    made = store.add_many(pictures(tmp_path))
    assert [picture.digest for picture in made] == [None] * 4


def batch_of(samples: list[Sample], digest: bytes | None, layout: Any) -> Batch:
    shown = [Picture(name, GRID, None, digest) for each in samples for name in each.images]
    return collate(samples, shown, [1] * len(shown), 0, layout)


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_a_batch_knows_the_share_of_each_row(layout: Any) -> None:
    """Supervised tokens lie row after row, so the counts cut them; a text row needs no digest for its key."""
    longer = sample(
        input_ids=np.arange(9), labels=np.where(np.arange(9) < 5, -100, np.arange(9)), positions=np.zeros((3, 9), int)
    )
    text = sample(images=(), visual=np.array([], int), labels=np.array([-100, 1, -100, -100, 4, -100]))
    rows = [sample(), text, longer]
    batch = batch_of(rows, b"d" * 32, layout)
    assert [(share.num_supervised, share.num_pictures) for share in batch.shares] == [(3, 2), (2, 0), (4, 2)]
    assert [share.key for share in batch.shares] == [row_key(row, [b"d" * 32] * len(row.images)) for row in rows]
    cut = batch.targets.split([share.num_supervised for share in batch.shares])
    assert [part.tolist() for part in cut] == [row.labels[row.labels >= 0].tolist() for row in rows]
    unhashed = batch_of(rows, None, layout)
    assert [share.key is None for share in unhashed.shares] == [True, False, True]
    merged = merge([batch, batch_of(rows[:1], b"e" * 32, layout)])
    assert merged.shares == (*batch.shares, RowShare(row_key(rows[0], [b"e" * 32] * 2), 3, 2))
    assert sum(share.num_supervised for share in merged.shares) == len(merged.targets)
