"""Scales with a sign: quantized, packed into every layout, trained, and what cannot hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny, write_model_folder
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import FormatError
from grace_vlm.formats.folder import read_grid
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import read_model
from grace_vlm.formats.verify import verify
from grace_vlm.ptq.quantize import quantize_folder
from grace_vlm.quant.affine import bake
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import train
from grace_vlm.train.step import StepReport

LAYOUTS = ("compressed-tensors", "awq", "gptq", "gptq_v2", "gguf", "mlx", "official-awq", "grace")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("signed")
    model, processor = build_tiny()
    write_model_folder(root / "plain", model, processor, lambda name: "bf16")
    quantize_folder(str(root / "plain"), root / "w4", "w4g32", scale="mse_signed")
    return root / "w4"


def test_half_of_the_scales_are_negative_and_baked_is_what_they_say(signed: Path) -> None:
    content = read_model(signed)
    for name, entry in content.linears.items():
        tensor = content.quantized[name]
        assert entry.scheme is not None
        assert 0.3 < float((tensor.scale < 0).float().mean()) < 0.7
        assert int(tensor.codes.min()) == entry.scheme.qmin
        assert torch.equal(content.baked[name], bake(tensor))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_with_plain_scales_gives_them_back(signed: Path, tmp_path: Path, layout: str) -> None:
    packed = pack(signed, tmp_path / "packed", layout)
    assert verify(signed, packed).equal
    before, after = read_model(signed), read_model(packed)
    for name in before.linears:
        one, other = before.quantized[name], after.quantized[name]
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)


def test_logarithms_have_no_sign(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as refusal:
        pack(signed, tmp_path / "packed", "official", allow_rounding=True)
    assert str(refusal.value) == (
        "the official layout stores logarithms of scales, and this model has negative ones (mse_signed, or a Q4_0 of "
        "llama.cpp); every other format takes them"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_the_signs_and_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    write_rows(tmp_path)
    write_models(tmp_path)
    tree = recipe_tree(tmp_path, quant={"scale_init": "mse_signed"}, optim__num_steps=3)
    whole = read_grid(train(recipe_from(tree, "test"), tmp_path / "whole"))
    signs = torch.cat([tensor.scale.sign().flatten() for tensor in whole.values()])
    assert 0.3 < float((signs < 0).float().mean()) < 0.7

    def stop(report: StepReport, num_steps: int) -> None:
        if report.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe_from(tree, "test"), tmp_path / "stopped", progress=stop)
    assert (tmp_path / "stopped" / "checkpoints" / "step-000001").is_dir()
    again = read_grid(train(recipe_from(tree, "test"), tmp_path / "stopped", resume=True))
    tree["optim"] |= {"learning_rate": 1e-30, "scale_learning_rate": 0.0}
    before = read_grid(train(recipe_from(tree, "test"), tmp_path / "start"))
    for name, tensor in whole.items():
        assert torch.equal(tensor.codes, again[name].codes)
        assert torch.equal(tensor.scale, again[name].scale)
        assert torch.equal(tensor.scale.sign(), before[name].scale.sign())
    assert any(not torch.equal(tensor.scale, before[name].scale) for name, tensor in whole.items())
