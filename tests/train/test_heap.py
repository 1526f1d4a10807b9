"""What Python's collector need not look at while a run goes on."""

from __future__ import annotations

import gc
from pathlib import Path

from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.train.config import Recipe
from grace_vlm.train.heap import WARM_STEPS
from grace_vlm.train.loop import train


def test_the_heap_is_frozen_while_steps_run_and_free_after(tmp_path: Path) -> None:
    write_rows(tmp_path, 8)
    write_models(tmp_path)
    tree = recipe_tree(tmp_path, optim__num_steps=WARM_STEPS + 3, runtime__checkpoint_every_steps=0)
    frozen: list[int] = []
    train(Recipe.model_validate(tree), tmp_path / "run", progress=lambda *_: frozen.append(gc.get_freeze_count()))
    assert frozen[0] == 0
    assert max(frozen) > 1000
    assert gc.get_freeze_count() == 0
