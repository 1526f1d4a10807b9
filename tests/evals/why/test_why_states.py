"""What is looked at is what the relation loss taps and the head reads, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_run import write_rows
from worlds import FAMILIES, loaded_toy

from grace_vlm.errors import ConfigError
from grace_vlm.evals.why.rows import BATCH_TOKENS, Sampled, SampledRows
from grace_vlm.evals.why.states import Watched


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("states"))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_adapters_forward(rows: Path, family: str) -> None:
    loaded = loaded_toy(family)
    watched = Watched(loaded, "student")
    batch = next(SampledRows(loaded, Sampled(rows, num_rows=5)).batches()).to(watched.device)
    vision = watched.vision(batch)
    states = watched.states(batch, vision, visual=True, layers=True)
    assert (len(states.visual), len(states.layers)) == (len(watched.layers) + 1, len(watched.layers))
    with torch.no_grad():
        tapped = loaded.adapter.decode(
            loaded.model,
            batch.input_ids,
            batch.position_ids,
            vision,
            tap=-2,
            segments=batch.segments,
            visual=batch.visual,
        )
    assert tapped.relational is not None
    assert torch.equal(states.visual[-2], tapped.relational)
    assert torch.equal(states.hidden, tapped.last.flatten(0, 1)[batch.supervised])
    assert len(states.visual[0]) == sum(batch.image_lengths)
    plain = watched.states(batch, vision)
    assert torch.equal(plain.hidden, states.hidden)
    assert plain.visual == plain.layers == ()


def test_rows_are_drawn_by_the_seed_and_batches_are_bounded(rows: Path) -> None:
    loaded = loaded_toy("tiny")
    every = SampledRows(loaded, Sampled(rows, num_rows=100))
    assert sorted(every.indices) == list(range(24))
    assert SampledRows(loaded, Sampled(rows, num_rows=7)).indices == every.indices[:7]
    assert SampledRows(loaded, Sampled(rows, num_rows=24, seed=1)).indices != every.indices
    batches = list(every.batches())
    assert all(batch.num_tokens <= BATCH_TOKENS for batch in batches)
    assert [name for batch in batches for name in batch.sample_ids] == [f"r{index}" for index in every.indices]


def test_pixel_limits_are_for_processors_with_an_area(rows: Path) -> None:
    few = SampledRows(loaded_toy("tiny"), Sampled(rows, num_rows=1, max_pixels=64 * 64))
    many = SampledRows(loaded_toy("tiny"), Sampled(rows, num_rows=1))
    lengths = [next(one.batches()).image_lengths[0] for one in (few, many)]
    assert lengths[0] < lengths[1]
    assert next(SampledRows(loaded_toy("llava"), Sampled(rows, num_rows=1)).batches()).image_lengths
    with pytest.raises(ConfigError, match="leave them out"):
        SampledRows(loaded_toy("llava"), Sampled(rows, num_rows=1, max_pixels=4096))
