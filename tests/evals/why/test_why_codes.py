"""Codes are counted, all of them."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.evals.why.codes import bits_used, code_use, histogram, share_at_ends
from grace_vlm.quant.affine import quantize_tensor
from grace_vlm.quant.scale_init import init_scale
from grace_vlm.quant.scheme import QuantizedTensor, parse_scheme


def tensor(codes: list[list[int]], scheme: str) -> QuantizedTensor:
    found = parse_scheme(scheme)
    assert found is not None
    made = torch.tensor(codes, dtype=torch.int8)
    return QuantizedTensor(made, torch.ones(len(codes), made.shape[1] // found.group_size, dtype=torch.bfloat16), found)


@pytest.mark.parametrize("scheme", ["w4g16", "w8g32", "w3g16", "w2g16"])
def test_every_code_is_counted_once(scheme: str) -> None:
    found = parse_scheme(scheme)
    assert found is not None
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize_tensor(weight, init_scale(weight, found, "minmax"), found)
    counts = histogram(quantized)
    assert len(counts) == 2**found.num_bits
    assert sum(counts) == 24 * 64
    for place, count in enumerate(counts):
        assert count == int((quantized.codes == place + found.qmin).sum())
    assert 0 < bits_used(counts) <= found.num_bits


def test_known_histograms() -> None:
    assert histogram(tensor([[-2, -1, 0, 1], [1, 1, 1, 0]], "w2g4")) == [1, 1, 2, 4]
    assert bits_used([1, 1, 2, 4]) == pytest.approx(1.75)
    assert bits_used([5, 5, 5, 5]) == 2.0
    assert bits_used([0, 9, 0, 0]) == 0.0
    assert share_at_ends([1, 1, 2, 4]) == 5 / 8


def test_schemes_are_kept_apart() -> None:
    found = code_use(
        {"a": tensor([[0, 1, -2, 0]], "w2g4"), "b": tensor([[7, -8]], "w4g2"), "c": tensor([[1] * 4], "w2g4")}
    )
    assert found["schemes"]["w2g4"]["counts"] == [1, 0, 2, 5]
    assert found["schemes"]["w2g4"]["first_code"] == -2
    assert found["schemes"]["w4g2"]["share_at_ends"] == 1.0
    assert {name: one["num_codes"] for name, one in found["linears"].items()} == {"a": 4, "b": 2, "c": 4}
