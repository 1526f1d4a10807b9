"""A checkpoint of another number of processes: its shares made whole, and shared out anew.

What a tensor is of says its name: ``W`` (a master), ``W.log_scale``, ``W#exp_avg`` (a moment of it), ``W#sign``. Its
rows are those of the leaf ``W``, or its parts are equal because every process had all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from grace_vlm.checkpoint.store import TENSOR_FIELDS, TrainState
from grace_vlm.errors import CheckpointError
from grace_vlm.train.adamw8 import BLOCK
from grace_vlm.train.masters import Masters


def shared_out(parts: Sequence[TrainState], masters: Masters) -> TrainState:
    """The state of this process, from those of all processes that wrote a checkpoint.

    Raises:
        CheckpointError: moments of one byte whose blocks the new shares would cut.
    """
    fields: dict[str, Any] = {
        field: {
            name: _own([getattr(part, field)[name] for part in parts], name, masters)
            for name in getattr(parts[0], field)
        }
        for field in TENSOR_FIELDS
    }
    return dataclasses.replace(parts[0], **fields)


def _own(parts: list[torch.Tensor], name: str, masters: Masters) -> torch.Tensor:
    """This process's share of one tensor."""
    base, _, moment = name.partition("#")
    shape, share = masters.leaf_of(base.removesuffix(".log_scale"))
    if moment == "scale" and parts[0].ndim == 2:
        return _own_blocks(parts, name, shape, share)
    if parts[0].ndim < 2:
        return parts[0]
    whole = parts[0] if parts[0].shape[0] == shape[0] else torch.cat(parts)
    return whole if share is None else whole[share].clone()


def _own_blocks(parts: list[torch.Tensor], name: str, shape: torch.Size, share: slice | None) -> torch.Tensor:
    """Of (2, blocks) scales of byte moments, blocks being of neighbours in memory."""
    columns = shape.numel() // shape[0]
    num_blocks = -(-shape.numel() // BLOCK)
    was_shared = parts[0].shape[1] != num_blocks
    if was_shared and (shape.numel() // len(parts)) % BLOCK:
        raise _cut(name)
    whole = torch.cat(parts, dim=1) if was_shared else parts[0]
    if share is None:
        return whole
    first, last = share.start * columns, share.stop * columns
    if first % BLOCK or last % BLOCK:
        raise _cut(name)
    return whole[:, first // BLOCK : last // BLOCK].clone()


def _cut(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} has moments of a byte in blocks of {BLOCK}, which another number of processes would cut; "
        "resume on as many as before"
    )
