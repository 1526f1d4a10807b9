"""Scales with a sign under the calibrated methods: less output error than ``mse``, and a sign that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrated_toys import load_toy, replay_of

from grace_vlm.ptq.awq import clipped_scale, output_error
from grace_vlm.ptq.block import reconstruct_layer
from grace_vlm.ptq.gptq import gptq_quantize
from grace_vlm.quant.affine import dequantize, fake_quantize, quantize_tensor
from grace_vlm.quant.scale_init import signed_scale
from grace_vlm.quant.scheme import QuantScheme, parse_scheme


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (96, 256), mean of x x^T of inputs that hang together)."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, 256, generator=drawn) @ (torch.eye(256) + 0.2 * torch.randn(256, 256, generator=drawn))
    return torch.randn(96, 256, generator=drawn) * 0.03, x.T @ x / len(x)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_second_search_of_awq_tries_both_signs(bits: int) -> None:
    weight, hessian = layer()
    scheme = QuantScheme(bits, 64)
    scales = [clipped_scale(weight, hessian, scheme, is_signed) for is_signed in (False, True)]
    errors = [output_error(fake_quantize(weight, scale, scheme, None) - weight, hessian) for scale in scales]
    assert bool((scales[0] > 0).all())
    assert 0.3 < float((scales[1] < 0).float().mean()) < 0.7
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_chooses_signs_as_it_goes(bits: int) -> None:
    weight, hessian = layer()
    scheme = QuantScheme(bits, 64)
    found = [gptq_quantize(weight, hessian, scheme, rule) for rule in ("mse", "mse_signed")]  # type: ignore[arg-type]
    errors = [output_error(dequantize(one.codes, one.scale.float(), torch.float32) - weight, hessian) for one in found]
    assert 0.3 < float((found[1].scale < 0).float().mean()) < 0.7
    assert errors[1] < 0.95 * errors[0]


def test_block_reconstruction_starts_with_signs_and_keeps_them(tmp_path: Path) -> None:
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    schemes: dict[str, QuantScheme] = dict.fromkeys(names, parse_scheme("w2g64"))  # type: ignore[arg-type]
    start, trained = [], []
    for num_passes, into in ((0, start), (10, trained)):
        replay = replay_of(load_toy("Qwen3-VL", torch.float32), tmp_path)
        weights = {name: replay.layers[0].get_submodule(name).weight.detach().clone() for name in names}
        found = reconstruct_layer(replay, 0, schemes, "mse_signed", {}, num_passes)
        for name, scheme in schemes.items():
            rounded = quantize_tensor(weights[name], signed_scale(weights[name], scheme), scheme)
            assert torch.equal(rounded.scale.sign(), found[name].scale.sign())
            assert torch.equal(rounded.codes, found[name].codes) == (num_passes == 0)
            into.append(found[name].scale)
    assert 0.3 < float((torch.cat([scale.flatten() for scale in start]) < 0).float().mean()) < 0.7
    assert any(not torch.equal(one, other) for one, other in zip(start, trained, strict=True))
