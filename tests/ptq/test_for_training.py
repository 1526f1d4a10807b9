"""``grace quantize --for-training``: what AWQ and block reconstruction would round, as a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_toys import FAMILIES, load_toy
from toy_run import recipe_tree, write_rows

from grace_vlm.errors import ConfigError, FormatError
from grace_vlm.formats.folder import START, open_grid, read_grid
from grace_vlm.formats.pack import pack
from grace_vlm.formats.publish import publish_model
from grace_vlm.models.adapter import stored_name
from grace_vlm.models.load import load_model
from grace_vlm.ptq.calibration import Calibration
from grace_vlm.ptq.quantize import quantize_folder
from grace_vlm.quant.affine import quantize
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder, num_rows=12)
    for family in FAMILIES:
        toy = load_toy(family, torch.bfloat16)
        publish_model(folder / family, toy.model, toy.processor, {}, (), "# toy\n")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["awq", "block"])
def test_rounding_the_start_is_what_the_method_gives_and_training_begins_there(
    family: str, method: Any, world: Path, tmp_path: Path
) -> None:
    rows = Calibration(world / "rows.jsonl", num_rows=8)
    same: dict[str, Any] = {"method": method, "scale": "mse_signed", "calibration": rows}
    quantize_folder(str(world / family), tmp_path / "w4", "w4g64", **same)
    quantize_folder(str(world / family), tmp_path / "start", "w4g64", **same, for_training=True)
    rounded, start = read_grid(tmp_path / "w4"), open_grid(tmp_path / "start", START)[2]
    loaded = load_model(str(tmp_path / "start"), "cpu")
    names = {stored_name(loaded.adapter, name): name for name, _ in loaded.model.named_modules()}
    agreed = total = 0
    for name, tensor in rounded.items():
        assert torch.equal(start[name].scale, tensor.scale)
        weight = loaded.model.get_submodule(names[name]).weight.float()
        assert not torch.equal(weight, weight.new_tensor(0))
        codes = quantize(weight, tensor.scale.float(), tensor.scheme)
        assert int((codes - tensor.codes).abs().max()) <= 1
        agreed, total = agreed + int((codes == tensor.codes).sum()), total + codes.numel()
    assert 0.99 * total < agreed < total  # weights are BF16 there, and some lie between two codes
    still = {"optim__num_steps": 1, "optim__learning_rate": 1e-30, "optim__scale_learning_rate": 0.0}
    tree = recipe_tree(world, scheme="w4g64", method="qat", quant={"scale_init": "stored"}, **still)
    tree["model"] = {"student": str(tmp_path / "start")}
    after = read_grid(train(recipe_from(tree, "test"), tmp_path / "run"))
    for name, tensor in rounded.items():
        assert torch.equal(after[name].scale, tensor.scale)


def test_awq_changes_nothing_but_what_rounding_will_cost(world: Path, tmp_path: Path) -> None:
    """In BF16 the start answers as the student does, and it has no grid yet."""
    rows = Calibration(world / "rows.jsonl", num_rows=8)
    quantize_folder(
        str(world / "LLaVA-1.5"), tmp_path / "start", "w2g64", method="awq", calibration=rows, for_training=True
    )
    states = []
    for folder in (world / "LLaVA-1.5", tmp_path / "start"):
        model = load_model(str(folder), "cpu").model.float()
        ids = torch.arange(20, 60).unsqueeze(0)
        with torch.no_grad():
            states.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        states.append(model.model.language_model.layers[0].self_attn.q_proj.weight.detach())
    assert float((states[0] - states[2]).norm() / states[0].norm()) < 0.02
    assert float((states[1] - states[3]).norm() / states[1].norm()) > 0.1
    with pytest.raises(FormatError, match="has no grid, so there is nothing to pack"):
        pack(tmp_path / "start", tmp_path / "packed", "awq")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_methods_without_weights_of_their_own_are_refused(method: Any, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--for-training is for awq and block, .*; after {method} train the student"):
        quantize_folder(str(world / "LLaVA-1.5"), tmp_path / "start", "w4g64", method=method, for_training=True)
    assert not list(tmp_path.iterdir())
