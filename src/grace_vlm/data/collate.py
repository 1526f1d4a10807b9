"""From samples to one ``Batch``: rows padded to one length, or laid end to end in one row (packing)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from grace_vlm.data.encode import IGNORE_INDEX, Sample
from grace_vlm.data.pictures import Picture

Layout = Literal["right", "left", "packed"]
"""Padding on the right (training), on the left (generation), or none: samples end to end."""


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
        segments: lengths of the samples that lie end to end in the one row; None where each has its own.
        pictures: in row order. image_lengths: visual tokens of each.
        sample_ids: ids of the rows, what errors name.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    supervised: torch.Tensor
    targets: torch.Tensor
    segments: tuple[int, ...] | None
    pictures: tuple[Picture, ...]
    image_lengths: tuple[int, ...]
    sample_ids: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())

    def to(self, device: torch.device) -> Batch:
        """The batch with what a step computes with on ``device``; labels and pictures stay where they are."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
            supervised=move(self.supervised),
            targets=move(self.targets),
        )


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
        begin += sample.num_tokens
    supervised = np.flatnonzero(next_labels != IGNORE_INDEX)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(mask) if layout == "left" else None,
        torch.from_numpy(supervised),
        torch.from_numpy(next_labels.reshape(-1)[supervised]),
        tuple(lengths) if layout == "packed" else None,
        tuple(pictures),
        tuple(image_lengths),
        tuple(sample.row_id for sample in samples),
    )
