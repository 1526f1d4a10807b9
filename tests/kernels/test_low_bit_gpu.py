"""The low-bit linear layer on a CUDA GPU: every kernel that can be chosen, true shapes, the same bits every time."""

from __future__ import annotations

import json

import pytest
import torch
from low_bit_cases import bound, error, exact, inputs_of, poison, weight

from grace_vlm.kernels import low_bit_linear as module
from grace_vlm.kernels.low_bit_cuda import (
    FEW_TOKENS,
    Setup,
    TileSetup,
    read_setup,
    run_few,
    run_many,
    setup_of,
    tile_setup_of,
)
from grace_vlm.kernels.low_bit_linear import Norm, interleaved, low_bit_linear, pack_linear
from grace_vlm.kernels.tuned import FILE

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SHAPES = [(4096, 2048, 128), (2048, 6144, 128), (64, 576, 64), (48, 96, 32), (80, 224, 224)]
TOKENS = [1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 130, 1000]
TILES = [
    TileSetup(tokens, *rest)
    for tokens in (32, 64, 128, 256)
    for rest in ((1, 1), (2, 1), (3, 1), (1, 2), (1, 2, 2), (1, 2, 4), (2, 1, 2))
    if (tokens, *rest) != (256, 3, 1)
] + [TileSetup(128, 3, arranged=True), TileSetup(256, 2, 1, 2, arranged=True)]


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
        y = low_bit_linear(x.to(GPU), packed)
        assert error(y, exact(x, tensor)) <= bound(x, tensor), tokens


def pickable(num_bits: int) -> list[tuple[int, Setup | TileSetup]]:
    """(tokens, setup): every one that rules and what was measured can choose here."""
    found: dict[Setup | TileSetup, int] = {}
    for out in (2048, 4096, 12288, 22016):
        for tokens in (1, 8, 9, 16, 17, 31, 33, 64, 65, 130, 300, 1024):
            if tokens <= FEW_TOKENS:
                found.setdefault(setup_of(tokens, 32), tokens)
            if HOPPER and tokens > 16:
                found.setdefault(tile_setup_of(tokens, out, 2048, 132), tokens)
    for name, won in json.loads(FILE.read_text()).get(torch.cuda.get_device_name(), {}).items():
        for measured, fields in won.items():
            setup = read_setup(fields)
            if setup is not None and name.startswith(f"w{num_bits} "):
                found.setdefault(setup, int(measured) - (int(measured) > 4))
    return [(tokens, setup) for setup, tokens in found.items()]


@pytest.mark.parametrize("bits", [4, 8])
def test_every_setup_is_right_and_the_same_every_time(bits: int) -> None:
    tensor = weight(bits, 4096, 2048, 128)
    packed = pack_linear(tensor, GPU)
    for tokens, setup in pickable(bits):
        x = inputs_of(tokens, 2048, torch.bfloat16)
        run = run_few if isinstance(setup, Setup) else run_many
        poison()
        first = run(setup, x.to(GPU), packed)  # type: ignore[operator]
        assert error(first, exact(x, tensor)) <= bound(x, tensor), (tokens, setup)
        for _ in range(100):
            assert torch.equal(run(setup, x.to(GPU), packed), first), (tokens, setup)  # type: ignore[operator]


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group"), [(4096, 2048, 128), (80, 576, 64), (48, 96, 32), (16, 352, 352)])
def test_tiles_of_every_shape(bits: int, out: int, inputs: int, group: int) -> None:
    """Odd numbers of tokens and tiles, tails and groups, with what is fused."""
    tensor = weight(bits, out, inputs, group)
    packed = pack_linear(tensor, GPU)
    for setup in TILES:
        for tokens in (1, setup.tokens, setup.tokens + 37, 3 * setup.tokens - 1):
            x, rest = inputs_of(tokens, inputs, torch.bfloat16), inputs_of(tokens, out, torch.bfloat16, seed=5)
            poison()
            y = run_many(setup, x.to(GPU), packed)
            assert error(y, exact(x, tensor)) <= bound(x, tensor), (tokens, setup)
            more = run_many(setup, x.to(GPU), packed, residual=rest.to(GPU))
            assert torch.equal(more, y + rest.to(GPU))


@pytest.mark.parametrize("kernels", ["tiles", "cuda", "triton"])
def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setenv("GRACE_KERNELS", kernels)
    packed = pack_linear(weight(4, 4096, 2048, 128), GPU)
    for tokens in TOKENS:
        x = inputs_of(tokens, 2048, torch.bfloat16).to(GPU)
        first = low_bit_linear(x, packed)
        for _ in range(100):
            assert torch.equal(low_bit_linear(x, packed), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 200])
def test_fused(monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("kernels", ["tiles", "cuda", "triton"])
def test_beyond_two_to_the_31_weights(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setenv("GRACE_KERNELS", kernels)
    out, inputs = (1 << 20) + 48, 2304
    assert out * inputs > 1 << 31
    last = weight(4, 64, inputs, 128)
    codes = last.codes.to(GPU).repeat(-(-out // 64), 1)[-out:]
    scale = last.scale.to(GPU).repeat(-(-out // 64), 1)[-out:]
    packed = pack_linear(module.QuantizedTensor(codes, scale, last.scheme), GPU)
    x = inputs_of(17 if kernels == "tiles" else 2, inputs, torch.bfloat16)
    y = low_bit_linear(x.to(GPU), packed)
    assert error(y[:, -64:], exact(x, last)) <= bound(x, last)
