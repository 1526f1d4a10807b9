"""A released LLaVA folder (original layout, sidecar) packed for runtimes: names, words, tower, processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from original_llava import toy_model, write_original, write_tower
from safetensors.torch import load_file, save_file

from grace_vlm.errors import FormatError
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import read_model
from grace_vlm.formats.sidecar import SIDECAR
from grace_vlm.formats.verify import verify
from grace_vlm.models.llava_layout import open_original_llava
from grace_vlm.quant import QuantScheme, bake, quantize_tensor


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Group size 32, BF16 scales that were FP32 logarithms."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model: Any = toy_model()
    write_tower(tmp_path / "toy-clip", model)
    folder = write_original(tmp_path / "llava", model)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    sidecar = {}
    for name in [n for n in tensors if n.startswith("model.layers.") and n.endswith("_proj.weight")]:
        weight, scheme = tensors[name].float(), QuantScheme(4, 32)
        scale = weight.reshape(len(weight), -1, 32).abs().amax(-1) / 7
        grid = quantize_tensor(weight, scale, scheme)
        tensors[name] = bake(grid)
        sidecar[name] = tensors[name].clone()
        sidecar[name.replace(".weight", ".log_scale")] = grid.scale.float().log().reshape(-1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(sidecar, folder / SIDECAR)
    return folder


def test_it_opens_in_stock_transformers_and_answers_alike(released: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert read_model(released).layout == "official"
    pack(released, tmp_path / "grace", "grace")
    packed = pack(released, tmp_path / "packed", "compressed-tensors", allow_rounding=True)
    original, processor = open_original_llava(released, torch.bfloat16)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "grace", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    state = original.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert AutoProcessor.from_pretrained(packed).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert verify(released, tmp_path / "grace").equal
    assert not verify(released, packed).equal  # FP32 exponentials, rounded to BF16 by consent


def test_without_its_tower_it_is_inspected_but_not_packed(released: Path, tmp_path: Path) -> None:
    (released.parent / "toy-clip" / "config.json").unlink()
    assert read_model(released).layout == "official"
    with pytest.raises(FormatError, match="vision tower"):
        pack(released, tmp_path / "packed", "grace")
    assert not (tmp_path / "packed").exists()
