"""Torch's own layer of 4 bits on a CPU: the same weights, with activations in BF16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from low_bit_cases import error, exact, inputs_of, weight

from grace_vlm.kernels.int4pack import int4pack_linear, pack_int4, takes_int4pack

pytestmark = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2")


@pytest.mark.parametrize(("out", "inputs", "group"), [(16, 64, 32), (48, 256, 64), (32, 384, 128)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_products(out: int, inputs: int, group: int, tokens: int) -> None:
    tensor, x = weight(4, out, inputs, group), inputs_of(tokens, inputs, torch.float32)
    assert takes_int4pack(tensor)
    y = int4pack_linear(x, pack_int4(tensor))
    assert y.dtype == torch.bfloat16
    assert error(y.float(), exact(x.bfloat16().float(), tensor)) < 5e-3


def test_what_it_does_not_take() -> None:
    tensor = weight(4, 16, 64, 32)
    assert not takes_int4pack(weight(8, 16, 64, 32))
    assert not takes_int4pack(weight(4, 24, 64, 32))
    assert not takes_int4pack(weight(4, 16, 96, 96))
    assert not takes_int4pack(replace(tensor, scale=tensor.scale.float()))
