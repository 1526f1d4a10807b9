"""The order of the rows: seeded, resumable, shared between ranks, and deaf to bad rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grace_vlm.data.collate import Batch
from grace_vlm.data.encode import Encoder
from grace_vlm.data.ledger import Ledger
from grace_vlm.data.loader import TrainLoader
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.reader import Preparer, RowReader
from grace_vlm.data.rows import RowFile
from grace_vlm.errors import DataError
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

NUM_ROWS = 24
BAD = (3, 12, 15)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    processor = build_toy_processor(["what is it number one two three?", "yes", "no"] * 3, vocab_size=380)
    return Encoder(processor, adapter_for("qwen3_vl"), build_toy_model("tiny", processor).config)


def write_rows(folder: Path, bad: Iterable[int] = ()) -> Path:
    """24 rows of different length, every third with a picture; the picture of a ``bad`` row is a text."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(NUM_ROWS):
        row: dict[str, Any] = {
            "id": f"r{i}",
            "conversations": [
                {"from": "human", "value": f"what is number {i}?" + " three" * (i * 7 % 10)},
                {"from": "gpt", "value": "yes" if i % 2 else "no"},
            ],
        }
        pixels = rng.integers(0, 255, (128, 128 + 32 * (i % 2), 3), dtype=np.uint8)
        if i % 3 == 0:
            row["image"] = f"{i}.png"
            Image.fromarray(pixels).save(folder / f"{i}.png")
        if i in bad:
            row["image"] = f"bad{i}.png"
            (folder / f"bad{i}.png").write_bytes(b"this is text")
        rows.append(row)
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def make_reader(path: Path, encoder: Encoder, **options: Any) -> RowReader:
    patchify = patchify_of(encoder.adapter, encoder.config, encoder.processor)
    store = PictureStore(patchify, options.pop("pixel_bytes", 0))
    ledger, max_bad_fraction = Ledger(path.parent / "ledger.jsonl"), options.pop("max_bad_fraction", 0.5)
    settings = {"max_tokens": 512, **options}
    return RowReader(Preparer(RowFile(path), encoder, store, **settings), ledger, max_bad_fraction)


def ids(loader: TrainLoader, num_batches: int) -> list[tuple[str, ...]]:
    return [loader.next().sample_ids for _ in range(num_batches)]


def flat(batches: Iterable[tuple[str, ...]]) -> list[str]:
    return [name for batch in batches for name in batch]


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "labels", "position_ids"))
    pictures = [(p.key, p.grid) for p in a.pictures] == [(p.key, p.grid) for p in b.pictures] and all(
        torch.equal(p.pixels, q.pixels) for p, q in zip(a.pictures, b.pictures, strict=True)
    )
    return tensors and pictures and a.sample_ids == b.sample_ids and a.image_lengths == b.image_lengths


def test_an_epoch_is_a_permutation_and_epochs_differ(tmp_path: Path, encoder: Encoder) -> None:
    loader = TrainLoader(make_reader(write_rows(tmp_path), encoder), 1, seed=5)
    first, second = flat(ids(loader, NUM_ROWS)), flat(ids(loader, NUM_ROWS))
    everything = sorted(f"r{i}" for i in range(NUM_ROWS))
    assert sorted(first) == sorted(second) == everything
    assert first != second
    again = TrainLoader(make_reader(tmp_path / "rows.json", encoder), 1, seed=5)
    assert flat(ids(again, 2 * NUM_ROWS)) == first + second
    other = TrainLoader(make_reader(tmp_path / "rows.json", encoder), 1, seed=6)
    assert flat(ids(other, NUM_ROWS)) != first


@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_bad_row_leaves_a_gap_and_never_a_neighbour(tmp_path: Path, encoder: Encoder, group_by_length: bool) -> None:
    options = {"seed": 3, "group_by_length": group_by_length}
    good = TrainLoader(make_reader(write_rows(tmp_path / "good"), encoder), 5, **options)
    bad_reader = make_reader(write_rows(tmp_path / "bad", BAD), encoder)
    bad = TrainLoader(bad_reader, 5, **options)
    lost = {f"r{i}" for i in BAD}
    for _ in range(15):  # three epochs
        whole = good.next()
        expected = tuple(name for name in whole.sample_ids if name not in lost)
        assert expected, "a batch of bad rows only would be skipped; choose another seed"
        holed = bad.next()
        assert holed.sample_ids == expected
        if expected == whole.sample_ids:
            assert same(whole, holed)
    assert bad.state_dict() == good.state_dict()
    ledger = [json.loads(line) for line in (tmp_path / "bad" / "ledger.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in ledger) == list(BAD)  # once each, over three epochs
    assert {line["kind"] for line in ledger} == {"image_not_an_image"}
    assert {line["id"] for line in ledger} == lost
    assert (tmp_path / "good" / "ledger.jsonl").read_text() == ""


def test_a_batch_of_bad_rows_only_is_skipped(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path, BAD)
    loader = TrainLoader(make_reader(path, encoder), 1, seed=0)
    names = flat(ids(loader, NUM_ROWS - len(BAD)))
    assert sorted(names) == sorted(f"r{i}" for i in range(NUM_ROWS) if i not in BAD)
    assert all(len(batch) == 1 for batch in ids(loader, 30))


def test_bad_rows_over_the_budget_stop_the_run(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path, BAD)
    loader = TrainLoader(make_reader(path, encoder, max_bad_fraction=2 / NUM_ROWS), 1, seed=0)
    with pytest.raises(DataError, match="3 bad rows of 24 are over the budget of 2"):
        ids(loader, NUM_ROWS)


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("done", [0, 1, 4, 5, 6, 11, 17])
def test_resume_gives_the_batches_that_would_have_come(
    tmp_path: Path, encoder: Encoder, done: int, group_by_length: bool
) -> None:
    path = write_rows(tmp_path, BAD)
    straight = TrainLoader(make_reader(path, encoder), 5, seed=2, group_by_length=group_by_length)
    for _ in range(done):
        straight.next()
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = TrainLoader(make_reader(path, encoder), 5, seed=2, group_by_length=group_by_length)
    resumed.load_state_dict(state)
    assert all(same(straight.next(), resumed.next()) for _ in range(8))
    assert straight.state_dict() == resumed.state_dict()


def test_grouping_by_length_is_a_permutation_of_like_lengths(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path)
    length = {f"r{i}": len(f"what is number {i}?") + 6 * (i * 7 % 10) for i in range(NUM_ROWS)}

    def epochs(group: bool) -> tuple[list[str], int]:
        loader = TrainLoader(make_reader(path, encoder), 4, seed=1, group_by_length=group)
        batches = ids(loader, 2 * NUM_ROWS // 4)
        spread = sum(max(length[n] for n in batch) - min(length[n] for n in batch) for batch in batches)
        return flat(batches), spread

    _, plain_spread = epochs(False)
    grouped, grouped_spread = epochs(True)
    everything = sorted(f"r{i}" for i in range(NUM_ROWS))
    assert sorted(grouped[:NUM_ROWS]) == sorted(grouped[NUM_ROWS:]) == everything
    assert grouped[:NUM_ROWS] != grouped[NUM_ROWS:]
    assert grouped_spread < 0.5 * plain_spread


def test_two_ranks_share_the_rows_of_an_epoch(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path)
    ranks = [TrainLoader(make_reader(path, encoder), 3, seed=4, rank=rank, world_size=2) for rank in (0, 1)]
    taken = [ids(loader, 8) for loader in ranks]
    merged = []
    for first, second in zip(*taken, strict=True):
        assert not set(first) & set(second)
        for pair in zip(first, second, strict=True):
            merged.extend(pair)
    one = TrainLoader(make_reader(path, encoder), 6, seed=4)
    assert merged == flat(ids(one, 8))
    assert sorted(merged[:NUM_ROWS]) == sorted(f"r{i}" for i in range(NUM_ROWS))
    assert ranks[0].state_dict() == ranks[1].state_dict() == one.state_dict()


def test_fewer_rows_than_processes_is_an_error(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(DataError) as caught:
        TrainLoader(make_reader(write_rows(tmp_path), encoder), 1, seed=0, rank=0, world_size=25)
    assert str(caught.value) == "24 rows cannot feed 25 processes; add rows or use fewer"


@pytest.mark.parametrize(
    "options", [{"pixel_bytes": 10**8}, {"samples_kept": 100}, {"pixel_bytes": 10**6, "samples_kept": 5}]
)
def test_caches_change_nothing(tmp_path: Path, encoder: Encoder, options: dict[str, int]) -> None:
    path = write_rows(tmp_path, BAD)
    plain = TrainLoader(make_reader(path, encoder), 4, seed=8)
    cached = TrainLoader(make_reader(path, encoder, **options), 4, seed=8)
    assert all(same(plain.next(), cached.next()) for _ in range(14))


def test_a_row_over_the_token_limit_goes_to_the_ledger(tmp_path: Path, encoder: Encoder) -> None:
    path = write_rows(tmp_path)
    generous = make_reader(path, encoder)
    lengths = {}
    for i in range(NUM_ROWS):
        ((_, sample, _),) = generous.read_many([i])
        lengths[i] = sample.num_tokens
    limit = sorted(lengths.values())[-3]
    reader = make_reader(path, encoder, max_tokens=limit)
    for i in range(NUM_ROWS):
        assert (reader.read_many([i]) == []) == (lengths[i] > limit)
    assert reader.ledger is not None
    for fault in reader.ledger.faults:
        assert fault.kind == "too_many_tokens"
        assert fault.reason == f"{lengths[fault.row]} tokens; the limit is {limit} (data.max_tokens)"
    assert len(reader.ledger.faults) == sum(n > limit for n in lengths.values()) > 0


def test_a_batch_is_padded_right_and_says_what_it_holds(tmp_path: Path, encoder: Encoder) -> None:
    reader = make_reader(write_rows(tmp_path), encoder)
    batch = TrainLoader(reader, 6, seed=1).next()
    assert batch.attention_mask is None
    picture = iter(zip(batch.pictures, batch.image_lengths, strict=True))
    for row, name in enumerate(batch.sample_ids):
        ((_, sample, own),) = reader.read_many([int(name[1:])])
        n = sample.num_tokens
        assert batch.input_ids[row, :n].tolist() == sample.input_ids.tolist()
        assert batch.labels[row, :n].tolist() == sample.labels.tolist()
        assert batch.position_ids[:, row, :n].tolist() == sample.positions.tolist()
        assert bool((batch.input_ids[row, n:] == encoder.tokenizer.pad_token_id).all())
        assert bool((batch.labels[row, n:] == -100).all())
        for expected in own:
            given, length = next(picture)
            assert given.key == expected.key
            assert length == given.grid[1] * given.grid[2] // 4
            assert int((sample.input_ids == encoder.image_token_id).sum()) == length
    assert next(picture, None) is None


def test_targets_are_the_next_tokens(tmp_path: Path, encoder: Encoder) -> None:
    batch = TrainLoader(make_reader(write_rows(tmp_path), encoder), 5, seed=1).next()
    positions, targets = batch.supervised, batch.targets
    width = batch.input_ids.shape[1]
    expected = [
        (row * width + column, int(batch.input_ids[row, column + 1]))
        for row in range(5)
        for column in range(width - 1)
        if batch.labels[row, column + 1] != -100
    ]
    assert list(zip(positions.tolist(), targets.tolist(), strict=True)) == expected
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sum(t == end for t in targets.tolist()) == 5
