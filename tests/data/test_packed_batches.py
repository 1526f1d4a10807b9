"""Packed micro-batches: every row once and whole, no token too many, and the same batches after a resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loader import BAD, NUM_ROWS, encoder, flat, ids, make_reader, same, write_rows

from grace_vlm.data.collate import grouped, merge
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


@pytest.mark.parametrize("is_packed", [False, True])
def test_merged_batches_hold_the_same_tokens(tmp_path: Path, encoder: Encoder, is_packed: bool) -> None:
    loader = TrainLoader(make_reader(write_rows(tmp_path), encoder), 3, seed=2, packed=is_packed)
    batches = [loader.next() for _ in range(4)]
    whole = merge(batches)
    token = encoder.image_token_id
    assert merge(batches[:1]) is batches[0]
    assert whole.sample_ids == tuple(name for batch in batches for name in batch.sample_ids)
    assert [p.key for p in whole.pictures] == [p.key for batch in batches for p in batch.pictures]
    assert whole.image_lengths == tuple(n for batch in batches for n in batch.image_lengths)
    flat_ids, positions = whole.input_ids.flatten(), whole.position_ids.flatten(1)
    for field in ("supervised", "visual"):
        given = [(b.input_ids.flatten(), b.position_ids.flatten(1), getattr(b, field)) for b in batches]
        assert flat_ids[getattr(whole, field)].tolist() == [t for ids_, _, at in given for t in ids_[at].tolist()]
        assert torch.equal(positions[:, getattr(whole, field)], torch.cat([p[:, at] for _, p, at in given], dim=1))
    assert (flat_ids[whole.visual] == token).all()
    assert int((flat_ids == token).sum()) == len(whole.visual) == sum(whole.image_lengths)
    assert torch.equal(whole.targets, torch.cat([batch.targets for batch in batches]))
    rows = whole.segments if is_packed else whole.input_ids.shape
    assert rows == (tuple(n for b in batches for n in b.segments or ()) if is_packed else
                    (12, max(b.input_ids.shape[1] for b in batches)))  # fmt: skip


@pytest.mark.parametrize("is_packed", [False, True])
def test_groups_are_as_large_as_they_may_be(tmp_path: Path, encoder: Encoder, is_packed: bool) -> None:
    loader = TrainLoader(make_reader(write_rows(tmp_path), encoder), 2, seed=4, packed=is_packed)
    batches = [loader.next() for _ in range(9)]
    longest = max(batch.num_tokens for batch in batches)
    for limit in (1, longest, 3 * longest, 10**6):
        groups = grouped(batches, limit)
        assert [batch for group in groups for batch in group] == batches
        for group, following in itertools.zip_longest(groups, groups[1:]):
            assert len(group) == 1 or merge(group).num_tokens <= limit
            assert following is None or merge([*group, following[0]]).num_tokens > limit
    assert len(grouped(batches, 10**6)) == 1
    assert len(grouped(batches, 1)) == 9
