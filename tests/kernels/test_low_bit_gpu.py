"""The low-bit linear layer on a CUDA GPU: every kernel that can be chosen, true shapes, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from low_bit_cases import bound, error, exact, inputs_of, weight

from grace_vlm.kernels import low_bit_linear as module
from grace_vlm.kernels.low_bit_linear import Norm, interleaved, low_bit_linear, pack_linear

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SHAPES = [(4096, 2048, 128), (2048, 6144, 128), (64, 576, 64), (48, 96, 32), (80, 224, 224)]
TOKENS = [1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 130, 1000]


def poison() -> None:
    """What the allocator gives next is full of NaN."""
    for size in (1 << 14, 1 << 18, 1 << 22):
        blocks = [torch.full((size,), float("nan"), dtype=torch.bfloat16, device=GPU) for _ in range(4)]
        del blocks


@pytest.mark.parametrize("kernels", ["tiles", "cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_every_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch, bits: int, out: int, inputs: int, group: int, dtype: torch.dtype, kernels: str
) -> None:
    monkeypatch.setenv("GRACE_KERNELS", kernels)
    tensor = weight(bits, out, inputs, group, wide=inputs == 224)
    packed = pack_linear(tensor, GPU)
    for tokens in TOKENS:
        x = inputs_of(tokens, inputs, dtype)
        poison()
        wanted = "dense" if tokens > 64 else kernels if kernels == "triton" else "cuda"
        is_many = kernels == "tiles" and tokens > 64 and packed.scale.dtype == torch.bfloat16
        assert module.path_of(tokens, packed, dtype) == ("tiles" if is_many and HOPPER else wanted)
        y = low_bit_linear(x.to(GPU), packed)
        assert error(y, exact(x, tensor)) <= bound(x, tensor), tokens


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernels", ["tiles", "cuda", "triton"])
def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch, bits: int, kernels: str) -> None:
    monkeypatch.setenv("GRACE_KERNELS", kernels)
    packed = pack_linear(weight(bits, 4096, 2048, 128), GPU)
    for tokens in TOKENS:
        x = inputs_of(tokens, 2048, torch.bfloat16).to(GPU)
        first = low_bit_linear(x, packed)
        for _ in range(100):
            assert torch.equal(low_bit_linear(x, packed), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 200])
def test_fused(monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype) -> None:
    monkeypatch.setenv("GRACE_KERNELS", "tiles")
    packed = pack_linear(interleaved(weight(4, 256, 512, 128, seed=2), weight(4, 256, 512, 128, seed=3)), GPU)
    x, norm = inputs_of(tokens, 512, dtype).to(GPU), Norm(inputs_of(1, 512, dtype)[0].to(GPU), 1e-6)
    bias, rest = inputs_of(1, 512, dtype, seed=4)[0].to(GPU), inputs_of(tokens, 256, dtype, seed=5).to(GPU)
    found = low_bit_linear(x, packed, bias=bias, residual=rest, norm=norm, silu=True)
    monkeypatch.setattr(module, "path_of", lambda *_: "torch")
    right = low_bit_linear(x, packed, bias=bias, residual=rest, norm=norm, silu=True)
    assert error(found, right.double()) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_a_layer_can_be_recorded() -> None:
    packed, x = pack_linear(weight(4, 256, 512, 128), GPU), inputs_of(3, 512, torch.bfloat16).to(GPU)
    right = low_bit_linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = low_bit_linear(x, packed)
    out.zero_()
    graph.replay()
    assert torch.equal(out, right)


@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_beyond_two_to_the_31_weights(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setenv("GRACE_KERNELS", kernels)
    out, inputs = (1 << 20) + 48, 2304
    assert out * inputs > 1 << 31
    last = weight(4, 64, inputs, 128)
    codes = last.codes.to(GPU).repeat(-(-out // 64), 1)[-out:]
    scale = last.scale.to(GPU).repeat(-(-out // 64), 1)[-out:]
    packed = pack_linear(module.QuantizedTensor(codes, scale, last.scheme), GPU)
    x = inputs_of(2, inputs, torch.bfloat16)
    y = low_bit_linear(x.to(GPU), packed)
    assert error(y[:, -64:], exact(x, last)) <= bound(x, last)
