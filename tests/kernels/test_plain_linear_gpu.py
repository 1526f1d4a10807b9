"""Plain weights and few tokens on a CUDA GPU: right, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from low_bit_cases import error, inputs_of, poison

from grace_vlm.errors import ConfigError
from grace_vlm.kernels.decoder_rows import gated_reference
from grace_vlm.kernels.plain_linear import FEW_TOKENS, plain_linear, takes_plain

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SHAPES = [(4096, 2048), (2048, 6144), (12288, 2048), (2048, 2048), (64, 576), (32, 96), (96, 1056), (151936, 2048)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_every_number_of_tokens(out: int, inputs: int, dtype: torch.dtype) -> None:
    weight = (inputs_of(out, inputs, dtype, seed=3) * 0.05).to(GPU)
    wide = weight.double()
    for tokens in (1, 2, 7, 8, 9, FEW_TOKENS):
        x = inputs_of(tokens, inputs, dtype).to(GPU)
        assert takes_plain(x, weight)
        poison()
        y, right = plain_linear(x, weight), x.double() @ wide.T
        assert error(y, right) <= 2 * error(torch.nn.functional.linear(x, weight), right), tokens
        for _ in range(100):
            assert torch.equal(plain_linear(x, weight), y)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_fused(tokens: int, silu: bool) -> None:
    x = inputs_of(tokens, 512, torch.bfloat16).to(GPU)
    weight = inputs_of(256, 512, torch.bfloat16, seed=3).to(GPU) * 0.05
    bias = inputs_of(1, 256, torch.bfloat16, seed=4)[0].to(GPU)
    rest = inputs_of(tokens, 128 if silu else 256, torch.bfloat16, seed=5).to(GPU)
    y = torch.nn.functional.linear(x, weight, bias)
    right = (gated_reference(y) if silu else y) + rest
    found = plain_linear(x, weight, bias=bias, residual=rest, silu=silu)
    assert error(found, right.double()) < 8e-3


def test_what_it_does_not_take() -> None:
    x, weight = inputs_of(4, 96, torch.bfloat16).to(GPU), inputs_of(32, 96, torch.bfloat16).to(GPU)
    assert takes_plain(x, weight)
    assert not takes_plain(x.cpu(), weight.cpu())
    assert not takes_plain(x.repeat(5, 1), weight)
    assert not takes_plain(x.float(), weight.float())
    assert not takes_plain(x, weight[:24])
    assert not takes_plain(x[:, :80].contiguous(), weight[:, :80].contiguous())
    assert not takes_plain(x, weight.T.contiguous().T)
    assert not takes_plain(x, weight[:, :64].contiguous())
    shifted = torch.empty(32 * 96 + 1, dtype=torch.bfloat16, device=GPU)[1:].view(32, 96)
    assert not takes_plain(x, shifted), "sixteen bytes at a time"
    with pytest.raises(ConfigError, match=r"residual \(1, 32\).*expected \(4, 32\)"):
        plain_linear(x, weight, residual=x.new_zeros(1, 32))
