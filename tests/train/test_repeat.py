"""``runtime.deterministic``: what it asks of torch, that it takes it back, and on a GPU that runs repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._inductor import config as compiler
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import train
from grace_vlm.train.repeat import repeatable


def asked() -> tuple[bool, ...]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), compiler.deterministic, filled


def test_it_lasts_as_long_as_the_run() -> None:
    before = asked()
    with repeatable(False):
        assert asked() == before
    with repeatable(True):
        assert asked() == (True, True, False)
    assert asked() == before
    with pytest.raises(KeyError), repeatable(True):
        raise KeyError
    assert asked() == before


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_long_rows_repeat_on_a_gpu(tmp_path: Path, compiled: bool) -> None:
    """Rows of several blocks of keys, whose sums differ from run to run otherwise."""
    path = write_rows(tmp_path, num_rows=16)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["conversations"][1]["value"] = "red blue " * 400
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    write_models(tmp_path)
    changes = {"data__max_tokens": 2048, "runtime__device": "cuda", "runtime__checkpoint_every_steps": 0}
    tree = recipe_tree(tmp_path, runtime__deterministic=True, runtime__compile=compiled, **changes)
    finals = [train(recipe_from(tree, "test"), tmp_path / name) for name in ("one", "two")]
    one, two = (next(final.glob("*.safetensors")).read_bytes() for final in finals)
    assert one == two
