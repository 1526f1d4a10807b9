"""What the other files of this folder show with gloo, over NCCL: two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launched import EVERYTHING, REASONS, contents, launch, recipe_of, strike

GPU: dict[str, Any] = {"runtime__device": "cuda", "runtime__cuda_graphs": False}
SHARDINGS: list[dict[str, Any]] = [
    {},
    {"runtime__sharding": "gradients"},
    {"runtime__sharding": "parameters"},
    EVERYTHING,
    {"runtime__gather": "codes"},
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL's processes need a GPU each: two"),
]


@pytest.mark.parametrize("shared", [{}, EVERYTHING], ids=["optimizer", "everything"])
@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_of_one_ends_all_with_one_reason(
    world: Path, tmp_path: Path, fault: str, shared: dict[str, Any]
) -> None:
    strike(world, tmp_path, fault, 2, 1, 5, **GPU, **shared)


def test_all_shardings_give_the_same_bits(world: Path, tmp_path: Path) -> None:
    """With one micro-batch a process, where the order of sums is the same."""
    for number, shared in enumerate(SHARDINGS):
        recipe = recipe_of(world, tmp_path, **GPU, data__accumulation=2, optim__num_steps=8, **shared)
        ended = launch(2, recipe, tmp_path / str(number))
        assert ended.code == 0, ended.said
    finals = [contents(tmp_path / str(number) / "final") for number in range(len(SHARDINGS))]
    for shared, final in zip(SHARDINGS[1:], finals[1:], strict=True):
        assert final["model.safetensors"] == finals[0]["model.safetensors"], shared


@pytest.mark.parametrize("shared", [{}, EVERYTHING], ids=["optimizer", "everything"])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(world: Path, tmp_path: Path, shared: dict[str, Any]) -> None:
    recipe = recipe_of(world, tmp_path, **GPU, optim__num_steps=10, runtime__checkpoint_every_steps=4, **shared)
    assert launch(2, recipe, tmp_path / "whole").code == 0
    stopped = launch(2, recipe, tmp_path / "run", plant=("usr1", 1, 4))
    assert stopped.reasons, stopped.said
    resumed = launch(2, recipe, tmp_path / "run", "--resume")
    assert resumed.code == 0, resumed.said
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "whole" / "final")
