"""Round to nearest: a published folder whose weights are the nearest points of the grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_run import write_models

from grace_vlm.formats.folder import read_grid
from grace_vlm.formats.weights import open_weights
from grace_vlm.ptq.quantize import quantize_folder


@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_code_is_the_nearest(tmp_path: Path, bits: int, rule: str) -> None:
    write_models(tmp_path)
    plan = quantize_folder(str(tmp_path / "student"), tmp_path / "q", f"w{bits}g64", scale=rule)  # type: ignore[arg-type]
    original, grid = open_weights(tmp_path / "student"), read_grid(tmp_path / "q")
    assert grid.keys() == plan.schemes.keys()
    assert len(grid) == 14
    for name, tensor in grid.items():
        weight = original[f"{name}.weight"].double().reshape(*tensor.scale.shape, 64)
        scale = tensor.scale.double().unsqueeze(-1)
        points = torch.arange(tensor.scheme.qmin, tensor.scheme.qmax + 1).double()
        distance = (weight.unsqueeze(-1) - scale.unsqueeze(-1) * points).abs()
        chosen = (weight - scale * tensor.codes.double().reshape(weight.shape)).abs()
        assert bool((chosen <= distance.amin(-1) + 1e-6 * scale).all()), name
