"""Packed micro-batches: every row once and whole, no token too many, and the same batches after a resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from test_loader import BAD, NUM_ROWS, encoder, flat, ids, make_reader, same, write_rows

from grace_vlm.data.encode import Encoder
from grace_vlm.data.loader import TrainLoader

__all__ = ["encoder"]
LIMIT = 120


def packed(path: Path, encoder: Encoder, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"seed": 3, "packed": True, "max_batch_tokens": LIMIT, **options}
    return TrainLoader(make_reader(path, encoder), settings.pop("rows", 100), **settings)


def test_packs_hold_whole_rows_up_to_the_limit_in_the_seeded_order(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path)
    loader = packed(path, encoder)
    order = flat(ids(TrainLoader(make_reader(path, encoder), 1, seed=3), NUM_ROWS))
    taken: list[str] = []
    batches = []
    while len(taken) < NUM_ROWS:
        batch = loader.next()
        assert batch.segments is not None
        assert batch.input_ids.shape == (1, sum(batch.segments))
        assert sum(batch.segments) <= LIMIT
        taken.extend(batch.sample_ids)
        batches.append(batch)
    assert taken[:NUM_ROWS] == order
    # The next row would not have fitted.
    for batch, following in itertools.pairwise(batches):
        assert sum(batch.segments or ()) + (following.segments or ())[0] > LIMIT
    # Positions begin again with every sample, and no sample's last token predicts.
    start = 0
    for length in batches[0].segments or ():
        assert batches[0].position_ids[:, 0, start].tolist() == [0, 0, 0]
        assert start + length - 1 not in batches[0].supervised.tolist()
        start += length


def test_the_number_of_rows_is_limited_too(tmp_path: Path, encoder: Encoder) -> None:
    loader = packed(write_rows(tmp_path), encoder, rows=2)
    assert max(len(batch) for batch in ids(loader, 12)) == 2


def test_without_a_limit_on_tokens_a_pack_is_the_padded_batch_laid_out(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path, BAD)
    padded = TrainLoader(make_reader(path, encoder), 5, seed=1)
    laid = TrainLoader(make_reader(path, encoder), 5, seed=1, packed=True)
    for _ in range(9):
        left, right = padded.next(), laid.next()
        assert left.sample_ids == right.sample_ids
        assert left.targets.tolist() == right.targets.tolist()
        assert right.num_tokens == sum(right.segments or ()) <= left.num_tokens


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 7])
def test_resume_inside_an_epoch_is_exact(tmp_path: Path, encoder: Encoder, done: int, workers: int) -> None:
    path = write_rows(tmp_path, BAD)
    straight = packed(path, encoder)
    for _ in range(done):
        straight.next()
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = packed(path, encoder, num_workers=workers)
    resumed.load_state_dict(state)
    for _ in range(9):
        left, right = straight.next(), resumed.next()
        assert left.segments == right.segments
        assert same(left, right)
    assert straight.state_dict() == resumed.state_dict()
    resumed.close()


def test_ranks_take_different_rows_and_together_all(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path)
    taken = []
    for rank in (0, 1):
        loader = packed(path, encoder, rank=rank, world_size=2)
        own: list[str] = []
        while loader.epoch == 0:
            before = (loader.epoch, len(own))
            own.extend(loader.next().sample_ids)
            if loader.epoch:
                # The batch that crosses into the next epoch may hold rows of both.
                own = own[: before[1]] + [name for name in own[before[1] :] if name not in own[: before[1]]]
        taken.append(own[: NUM_ROWS // 2])
    assert not set(taken[0]) & set(taken[1])
    assert sorted(taken[0] + taken[1]) == sorted(f"r{i}" for i in range(NUM_ROWS))
