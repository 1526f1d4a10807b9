"""From samples to one ``Batch``: rows padded to one length, or laid end to end in one row (packing)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from grace_vlm.data.encode import IGNORE_INDEX, Sample
from grace_vlm.data.pictures import Picture
from grace_vlm.data.row_key import row_key
from grace_vlm.kernels.upload import upload

Layout = Literal["right", "left", "packed"]
"""Padding on the right (training), on the left (generation), or none: samples end to end."""


@dataclass(frozen=True)
class RowShare:
    """What one row has in a batch: supervised tokens and pictures are row after row in it.

    Args:
        key: ``data.row_key`` of the row; None where its pictures have no digests.
    """

    key: bytes | None
    num_supervised: int
    num_pictures: int


@dataclass(frozen=True)
class Batch:
    """What a model is given.

    Args:
        input_ids: (B, S) int64, padded. labels: (B, S) int64, -100 where nothing is supervised, not shifted.
        position_ids: (3, B, S) int64.
        attention_mask: (B, S) int64 with left padding; None with right padding, where causal attention never lets a
            real token see a pad.
        supervised: (n_supervised,) int64, the flat positions in B*S whose next token is supervised.
        targets: (n_supervised,) int64, those next tokens.
        visual: (n_visual,) int64, the flat positions in B*S of visual tokens, picture after picture.
        segments: lengths of the samples that lie end to end in the one row; None where each has its own.
        pictures: in row order. image_lengths: visual tokens of each.
        sample_ids: ids of the rows, what errors name. shares: what each has in the batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    supervised: torch.Tensor
    targets: torch.Tensor
    visual: torch.Tensor
    segments: tuple[int, ...] | None
    pictures: tuple[Picture, ...]
    image_lengths: tuple[int, ...]
    sample_ids: tuple[str, ...]
    shares: tuple[RowShare, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())

    def to(self, device: torch.device) -> Batch:
        """The batch with what a step computes with on ``device``; labels and pictures stay where they are."""

        return dataclasses.replace(
            self,
            input_ids=upload(self.input_ids, device),
            position_ids=upload(self.position_ids, device),
            attention_mask=None if self.attention_mask is None else upload(self.attention_mask, device),
            supervised=upload(self.supervised, device),
            targets=upload(self.targets, device),
            visual=upload(self.visual, device),
        )


def _shares(samples: Sequence[Sample], pictures: Sequence[Picture]) -> tuple[RowShare, ...]:
    shares, first = [], 0
    for sample in samples:
        own = pictures[first : first + len(sample.images)]
        digests = [picture.digest for picture in own if picture.digest is not None]
        key = row_key(sample, digests) if len(digests) == len(own) else None
        shares.append(RowShare(key, int((sample.labels[1:] != IGNORE_INDEX).sum()), len(own)))
        first += len(own)
    return tuple(shares)


def collate(
    samples: Sequence[Sample],
    pictures: Sequence[Picture],
    image_lengths: Sequence[int],
    pad_token_id: int,
    layout: Layout = "right",
) -> Batch:
    """Put samples together; ``left`` (generation) also makes an attention mask.

    Packed samples keep their own positions, each from 0, and no token predicts across a border.
    """
    lengths = [sample.num_tokens for sample in samples]
    size = (1, sum(lengths)) if layout == "packed" else (len(samples), max(lengths))
    input_ids = np.full(size, pad_token_id, dtype=np.int64)
    labels = np.full(size, IGNORE_INDEX, dtype=np.int64)
    # The shift happens here and nowhere else, on the host: the state at position t predicts token t + 1.
    next_labels = np.full(size, IGNORE_INDEX, dtype=np.int64)
    positions = np.zeros((3, *size), dtype=np.int64)
    mask = np.zeros(size, dtype=np.int64)
    visual = []
    begin = 0
    for number, sample in enumerate(samples):
        row = 0 if layout == "packed" else number
        start = begin if layout == "packed" else 0 if layout == "right" else size[1] - sample.num_tokens
        where = slice(start, start + sample.num_tokens)
        input_ids[row, where] = sample.input_ids
        labels[row, where] = sample.labels
        next_labels[row, start : start + sample.num_tokens - 1] = sample.labels[1:]
        positions[:, row, where] = sample.positions
        mask[row, where] = 1
        visual.append(row * size[1] + start + sample.visual)
        begin += sample.num_tokens
    supervised = np.flatnonzero(next_labels != IGNORE_INDEX)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(mask) if layout == "left" else None,
        torch.from_numpy(supervised),
        torch.from_numpy(next_labels.reshape(-1)[supervised]),
        torch.from_numpy(np.concatenate(visual)),
        tuple(lengths) if layout == "packed" else None,
        tuple(pictures),
        tuple(image_lengths),
        tuple(sample.row_id for sample in samples),
        _shares(samples, pictures),
    )


def merge(batches: Sequence[Batch]) -> Batch:
    """One batch of the samples of several in the same layout, in order; what it pads has token id 0.

    A model that is only asked, the teacher, need not be given the small batches that its student's gradients need.
    """
    if len(batches) == 1:
        return batches[0]
    packed = batches[0].segments is not None
    assert all((batch.segments is not None) == packed and batch.attention_mask is None for batch in batches)
    width = max(batch.input_ids.shape[1] for batch in batches)
    dim = 1 if packed else 0

    def join(tensors: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        """(..., B, S) of each, padded on the right to one S unless they are packed."""
        if not packed:
            tensors = [F.pad(tensor, (0, width - tensor.shape[-1]), value=value) for tensor in tensors]
        return torch.cat(list(tensors), dim=tensors[0].ndim - 2 + dim)

    starts, begin = [], 0
    for batch in batches:
        starts.append(begin)
        begin += batch.num_tokens if packed else batch.input_ids.shape[0] * width

    def place(flat: torch.Tensor, batch: Batch, start: int) -> torch.Tensor:
        """Flat positions of a batch in the joined one."""
        own = batch.input_ids.shape[1]
        return start + flat if packed else start + flat // own * width + flat % own

    return Batch(
        join([batch.input_ids for batch in batches], 0),
        join([batch.labels for batch in batches], IGNORE_INDEX),
        join([batch.position_ids for batch in batches], 0),
        None,
        torch.cat([place(batch.supervised, batch, start) for batch, start in zip(batches, starts, strict=True)]),
        torch.cat([batch.targets for batch in batches]),
        torch.cat([place(batch.visual, batch, start) for batch, start in zip(batches, starts, strict=True)]),
        tuple(itertools.chain.from_iterable(batch.segments or () for batch in batches)) if packed else None,
        tuple(itertools.chain.from_iterable(batch.pictures for batch in batches)),
        tuple(itertools.chain.from_iterable(batch.image_lengths for batch in batches)),
        tuple(itertools.chain.from_iterable(batch.sample_ids for batch in batches)),
        tuple(itertools.chain.from_iterable(batch.shares for batch in batches)),
    )


def grouped(batches: Sequence[Batch], max_tokens: int) -> list[list[Batch]]:
    """Neighbours whose tokens, padding included, add up to at most ``max_tokens``; a larger batch is alone."""
    groups: list[list[Batch]] = []
    num_rows = width = 0
    for batch in batches:
        rows, columns = batch.input_ids.shape
        is_packed = batch.segments is not None
        longer = width + columns if is_packed else max(width, columns)
        higher = 1 if is_packed else num_rows + rows
        if not groups or longer * higher > max_tokens:
            groups.append([])
            longer, higher = columns, rows
        groups[-1].append(batch)
        num_rows, width = higher, longer
    return groups
