"""A fold leaves what a layer computes: to the last digits of FP64, on every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_toys import FAMILIES, load_toy, replay_of

from grace_vlm.errors import ConfigError
from grace_vlm.ptq.fold import channel_map, fold
from grace_vlm.ptq.layers import STAGES, Stage, quantize_layers
from grace_vlm.ptq.replay import Replay
from grace_vlm.quant.scheme import parse_scheme

EXACT = 1e-12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def in_full_precision(model: Any) -> None:
    """Norms that compute in FP64: Transformers' own go through FP32, whose rounding would hide a fault of a fold."""

    def forward_of(norm: Any) -> Any:
        return lambda x: norm.weight * (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt())

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = forward_of(module)


def wild_scale(size: int) -> torch.Tensor:
    return torch.empty(size).uniform_(-3, 3, generator=torch.Generator().manual_seed(size)).exp2().double()


def fold_stage(layer: Any, stage: Stage) -> torch.Tensor:
    readers = [layer.get_submodule(name) for name in stage.linears]
    channels = channel_map(layer, stage.source, readers[0].weight.shape[1])
    assert channels is not None
    source = layer.get_submodule(stage.source)
    return fold(source, readers, wild_scale(source.weight.shape[0]), channels)


def change(replay: Replay, before: list[torch.Tensor]) -> float:
    """The largest of the layers' changes, relative to what the layer adds to its input."""
    worst = 0.0
    for number, old in enumerate(before):
        entered, new = replay.run(number, 0)
        worst = max(worst, float((new - old).norm() / (old - entered).norm()))
        replay.advance(number)
    return worst


def outputs(replay: Replay) -> list[torch.Tensor]:
    found = []
    for number in range(len(replay.layers)):
        found.append(replay.run(number, 0)[1])
        replay.advance(number)
    return found


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.source)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_fold_is_exact(family: str, stage: Stage, folder: Path) -> None:
    loaded = load_toy(family, torch.float64)
    in_full_precision(loaded.model)
    replay = replay_of(loaded, folder)
    before = outputs(replay)
    for layer in replay.layers:
        weights = [layer.get_submodule(name).weight.detach().clone() for name in stage.linears]
        scale = fold_stage(layer, stage)
        assert float(scale.log2().abs().max()) > 1, "a scale of one tests nothing"
        for name, weight in zip(stage.linears, weights, strict=True):
            assert not torch.equal(layer.get_submodule(name).weight, weight)
        source = layer.get_submodule(stage.source)
        stored = source.weight if source.weight.ndim == 1 else source.bias
        if stored is not None:
            assert torch.equal(stored, stored.to(torch.bfloat16).double()), "published in BF16, so it is BF16's now"
    assert change(replay, before) < EXACT


def test_qwen2_vl_folds_into_a_bias(folder: Path) -> None:
    """The case that rounding would break: v_proj has a bias, which is published in BF16."""
    layer = replay_of(load_toy("Qwen2-VL", torch.float64), folder).layers[0]
    assert layer.self_attn.v_proj.bias is not None
    asked = wild_scale(layer.self_attn.v_proj.out_features)
    bias = layer.self_attn.v_proj.bias.detach().clone()
    scale = fold_stage(layer, STAGES[1])
    assert torch.allclose(scale, asked, rtol=2**-8)
    assert not torch.equal(scale, asked)
    assert torch.allclose(layer.self_attn.v_proj.bias * scale, bias, rtol=1e-15, atol=0)


def test_values_that_no_scale_fits() -> None:
    """Zero takes any scale; a quotient outside BF16 keeps its value and gets the scale 1."""
    norm = torch.nn.Module()
    stored = torch.tensor([0.0, 1e-30, 1e30, -2.0], dtype=torch.float64)
    norm.weight = torch.nn.Parameter(stored.clone())
    reader = torch.nn.Linear(4, 3, dtype=torch.float64)
    scale = torch.tensor([2.0, 1e20, 1e-20, 3.0], dtype=torch.float64)
    before = reader.weight.detach() * stored
    folded = fold(norm, [reader], scale, torch.arange(4))
    assert folded[:3].tolist() == [2.0, 1.0, 1.0]
    assert norm.weight[:3].tolist() == stored[:3].tolist()
    assert torch.allclose(reader.weight.detach() * norm.weight.detach(), before, rtol=1e-15, atol=0)


def test_grouped_heads_share_a_scale(folder: Path) -> None:
    layer = replay_of(load_toy("Qwen3-VL", torch.float32), folder).layers[0]
    channels = channel_map(layer, "self_attn.v_proj", layer.self_attn.o_proj.in_features)
    assert channels is not None
    # Two query heads of 64 on one key and value head.
    assert channels.tolist() == [*range(64), *range(64)]
    assert channel_map(layer, "self_attn.v_proj", 3 * 64 + 1) is None
    assert channel_map(layer, "mlp.up_proj", 2 * layer.mlp.up_proj.out_features) is None


def test_a_fold_into_an_unknown_norm_is_refused(folder: Path) -> None:
    """A norm that multiplies by 1 + weight: dividing its weight does not divide its output."""
    loaded = load_toy("Qwen3-VL", torch.float32)
    replay = replay_of(loaded, folder)
    norm = replay.layers[1].post_attention_layernorm
    plain = norm.forward
    norm.forward = lambda x: plain(x) + plain(x) / norm.weight
    scheme = parse_scheme("w4g64")
    assert scheme is not None
    schemes = {f"{layer}.{name}": scheme for layer in replay.names for stage in STAGES for name in stage.linears}
    with pytest.raises(ConfigError) as caught:
        quantize_layers(loaded.model, schemes, replay, "awq", "minmax")
    assert str(caught.value) == (
        "awq changes what model.language_model.layers.1 (Qwen3VLTextDecoderLayer) computes, which has norms or heads "
        "that it does not know; use --method gptq"
    )
