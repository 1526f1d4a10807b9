"""A teacher in FP8: rounded row by row, close to itself in BF16, and the rest untouched."""

from __future__ import annotations

import pytest
import torch
from toy_world import TEXTS, World

from grace_vlm.models.fp8 import Fp8Linear, quantize_rows, to_fp8
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor


def test_rows_are_scaled_to_the_largest_e4m3_value() -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 7).unsqueeze(1)
    codes, scale = quantize_rows(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (7, 1)
    assert bool((codes.float().abs().amax(dim=1) == 448).all())
    # E4M3 has three bits behind the point: half a step is 1/16 of the value, less near zero in absolute terms.
    error = (codes.float() * scale - x).abs()
    assert bool((error <= x.abs() / 16 + scale * 2**-10).all())
    zeros, scale = quantize_rows(torch.zeros(2, 16))
    assert bool((zeros.float() == 0).all())
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_near_itself_and_survives_float(bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, bias=bias)
    eight = Fp8Linear(linear)
    x = torch.randn(3, 5, 256)
    expected, found = linear(x), eight(x)
    assert found.shape == expected.shape
    error = float((found - expected).norm() / expected.norm())
    assert 0.005 < error < 0.05, "rounded, and not by much"
    before = eight.get_buffer("weight_bytes").clone()
    again = eight.float()(x)
    assert torch.equal(eight.get_buffer("weight_bytes"), before)
    assert torch.equal(again, found)


@torch.no_grad()
def test_only_linears_of_decoder_and_tower_change(world: World) -> None:
    processor = build_toy_processor(TEXTS * 4, vocab_size=384)
    model = build_toy_model("student", processor, seed=3).eval()
    ids = torch.tensor([[5, 9, 20, 31, 44, 60]])
    before = model(input_ids=ids).logits
    to_fp8(model, adapter_for("qwen3_vl"))
    kinds = [type(module).__name__ for module in model.modules()]
    depth = model.config.vision_config.depth
    assert kinds.count("Fp8Linear") == 7 * 4 + 4 * depth
    assert not any(isinstance(module, Fp8Linear) for module in model.model.visual.merger.modules())
    assert isinstance(model.lm_head, torch.nn.Linear)
    after = model(input_ids=ids).logits
    relative = float((after - before).norm() / before.norm())
    # Random logits have nothing to be robust with; what matters here is that they are the same model's.
    assert 1e-3 < relative < 0.3
