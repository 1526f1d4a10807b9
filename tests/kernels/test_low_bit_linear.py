"""The low-bit linear layer: torch's path, Triton's in its interpreter, what is fused; on a GPU whatever is chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from low_bit_cases import bound, error, exact, inputs_of, weight

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import low_bit_cuda
from grace_vlm.kernels import low_bit_linear as module
from grace_vlm.kernels import tuned as tuned_module
from grace_vlm.kernels.fragments import PackedLinear
from grace_vlm.kernels.low_bit_cuda import FEW_TOKENS, Setup, defines_of, read_setup, setup_of
from grace_vlm.kernels.low_bit_linear import (
    Norm,
    interleaved,
    joined,
    low_bit_linear,
    pack_linear,
    path_of,
)
from grace_vlm.quant.affine import dequantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(16, 32, 32), (48, 96, 32), (48, 192, 96), (32, 256, 128), (80, 576, 64), (16, 352, 352)]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_tritons_kernel(bits: int, out: int, inputs: int, group: int, dtype: torch.dtype) -> None:
    from grace_vlm.kernels.low_bit_triton import linear

    tensor = weight(bits, out, inputs, group, wide=group == 96)
    packed = pack_linear(tensor, DEVICE)
    for tokens in (1, 3, 17, 70):
        x = inputs_of(tokens, inputs, dtype)
        y = linear(x.to(DEVICE), packed)
        assert y.dtype == dtype
        assert error(y, exact(x, tensor)) <= bound(x, tensor)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_tritons_dequantized_rows(bits: int, out: int, inputs: int, group: int) -> None:
    from grace_vlm.kernels.low_bit_triton import dequantize_rows

    tensor = weight(bits, out, inputs, group)
    packed, right = pack_linear(tensor, DEVICE), dequantize(tensor.codes, tensor.scale).to(DEVICE)
    for first in range(0, out, 16):
        rows = torch.full((16, inputs), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        dequantize_rows(packed, rows, first)
        assert torch.equal(rows, right[first : first + 16])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5, FEW_TOKENS, FEW_TOKENS + 1, 300])
def test_the_operator(tokens: int, keep: bool, dtype: torch.dtype) -> None:
    if DEVICE.type == "cuda" and dtype == torch.float32:
        pytest.skip("torch's FP32 products on a GPU are another test's")
    for bits in (4, 8):
        tensor = weight(bits, 48, 192, 64)
        x = inputs_of(tokens, 192, dtype)
        y = low_bit_linear(x.to(DEVICE).view(1, tokens, 192), pack_linear(tensor, DEVICE, keep_bf16=keep))
        assert y.shape == (1, tokens, 48)
        assert y.dtype == dtype
        if tokens:
            assert error(y[0], exact(x, tensor)) <= max(bound(x, tensor), 1e-6)


@pytest.mark.parametrize("path", ["torch", "triton", "dense"])
def test_what_is_fused_is_what_layers_do_one_by_one(path: module.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "path_of", lambda *_: path)
    gate, value = weight(4, 48, 128, 32, seed=2), weight(4, 48, 128, 32, seed=3)
    x, norm = inputs_of(7, 128, torch.bfloat16).to(DEVICE), Norm(inputs_of(1, 128, torch.bfloat16)[0].to(DEVICE), 1e-6)
    bias = inputs_of(1, 96, torch.bfloat16, seed=4)[0].to(DEVICE)
    rest = inputs_of(7, 48, torch.bfloat16, seed=5).to(DEVICE)

    normed = F.rms_norm(x.float(), (128,), None, 1e-6).bfloat16() * norm.weight
    weights = [dequantize(t.codes, t.scale, torch.float32).to(DEVICE) for t in (gate, value)]
    wide_bias = bias.view(-1, 2, 8).transpose(0, 1).reshape(2, -1).float()
    parts = [F.linear(normed.float(), w, b).bfloat16() for w, b in zip(weights, wide_bias, strict=True)]
    right = F.silu(parts[0]) * parts[1] + rest

    packed = pack_linear(interleaved(gate, value), DEVICE)
    found = low_bit_linear(x, packed, bias=bias, residual=rest, norm=norm, silu=True)
    assert found.shape == (7, 48)
    assert error(found, right.double()) < 8e-3
    both = pack_linear(joined([gate, value]), DEVICE)
    apart = low_bit_linear(x, both)
    for number, tensor in enumerate((gate, value)):
        own = low_bit_linear(x, pack_linear(tensor, DEVICE))
        assert error(apart[:, 48 * number : 48 * number + 48], own.double()) < 4e-3


def test_pieces_of_scratch_memory_make_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, x = weight(4, 80, 128, 64), inputs_of(70, 128, torch.bfloat16).to(DEVICE)
    bias = inputs_of(1, 80, torch.bfloat16)[0].to(DEVICE)
    monkeypatch.setattr(module, "path_of", lambda *_: "dense")
    packed = pack_linear(tensor, DEVICE)
    whole = low_bit_linear(x, packed, bias=bias)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 32 * 128 * 2)
    assert error(low_bit_linear(x, packed, bias=bias), whole.double()) < 4e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_takes_a_wide_weight_in_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, x = weight(bits, 80, 128, 64), inputs_of(5, 128, torch.float32).to(DEVICE)
    bias = inputs_of(1, 80, torch.float32)[0].to(DEVICE)
    monkeypatch.setattr(module, "path_of", lambda *_: "torch")
    packed, seen, values = pack_linear(tensor, DEVICE), [], module._values
    monkeypatch.setattr(module, "_values", lambda part: seen.append(part.out_features) or values(part))
    whole = low_bit_linear(x, packed, bias=bias)
    monkeypatch.setattr(module, "REFERENCE_ELEMENTS", 40 * 128)
    torch.testing.assert_close(low_bit_linear(x, packed, bias=bias), whole, atol=1e-5, rtol=1e-5)
    assert seen == [80, 32, 32, 16]


@dataclass(frozen=True)
class Elsewhere(PackedLinear):
    """A layer on a GPU that is not here."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def test_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    here = pack_linear(weight(4, 128, 128, 64))
    there = Elsewhere(**{field.name: getattr(here, field.name) for field in fields(here)})
    capability, forget = [(9, 0)], low_bit_cuda._setup_for.cache_clear
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU that nobody measured")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(module, "has_nvrtc", lambda: True)
    monkeypatch.setattr(module, "runs_triton", lambda *_: True)
    half = torch.float16
    assert path_of(1, here, torch.bfloat16) == "torch"
    assert path_of(1, there, torch.float32) == "torch"
    monkeypatch.setenv("GRACE_KERNELS", "cuda")
    assert [path_of(n, there, half) for n in (1, 64, 65, 5000)] == ["cuda", "cuda", "dense", "dense"]
    monkeypatch.delenv("GRACE_KERNELS")
    assert [path_of(n, there, half) for n in (1, 16, 17, 64, 65, 5000)] == ["cuda"] * 2 + ["tiles"] * 4
    assert path_of(2 << 20, there, half) == "dense"
    kept = replace(there, dense=torch.zeros(1))
    assert [path_of(n, kept, torch.bfloat16) for n in (64, 65)] == ["tiles", "dense"]
    assert path_of(65, kept, half) == "tiles"
    wide = replace(there, scale=there.scale.float())
    assert [path_of(n, wide, half) for n in (1, 64, 65)] == ["cuda", "cuda", "dense"]
    capability[0] = (8, 6)
    forget()
    assert [path_of(n, there, half) for n in (64, 65)] == ["cuda", "dense"]
    capability[0] = (7, 5)
    assert path_of(64, there, half) == "triton"
    monkeypatch.setattr(module, "runs_triton", lambda *_: False)
    assert path_of(64, there, half) == "torch"
    monkeypatch.setenv("GRACE_KERNELS", "triton")
    capability[0] = (9, 0)
    assert path_of(65, there, half) == "dense"
    monkeypatch.setenv("GRACE_KERNELS", "torch")
    assert path_of(1, there, half) == "torch"
    monkeypatch.setenv("GRACE_KERNELS", "fast")
    with pytest.raises(ConfigError) as caught:
        path_of(1, there, half)
    assert str(caught.value) == "GRACE_KERNELS is 'fast'; expected tiles, cuda, triton or torch, or leave it out"


def test_what_was_measured_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = {"eights": 1, "rows": 2, "warps": 4, "depth": 2}, {"tokens": 64, "groups": 2}
    won: dict[str, dict[str, int]] = {"8": few, "64": {**few, "eights": 8}, "256": {}, "1024": many}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"GPU": {"w4 4096x2048": won, "w8 64x64": {"8": {}}}}))
    monkeypatch.setattr(tuned_module, "FILE", file)
    tuned_module._measured.cache_clear()
    tuned_module.tuned.cache_clear()
    try:
        assert tuned_module.tuned("GPU", 4, 4096, 2048, 5) == won["8"]
        assert tuned_module.tuned("GPU", 4, 5000, 1500, 9) == won["64"]
        assert [tuned_module.tuned("GPU", 4, 4096, 2048, n) for n in (192, 900)] == [{}, won["1024"]]
        # Nobody measured so many, or such a layer with many.
        assert [tuned_module.tuned("GPU", 4, 4096, 2048, n) for n in (65, 191, 700, 9000)] == [None] * 4
        assert tuned_module.tuned("GPU", 4, 4096, 4096, 1024) is None
        assert tuned_module.tuned("GPU", 8, 64, 64, 9) is None
        assert tuned_module.tuned("GPU", 4, 512, 2048, 5) is None
        assert tuned_module.tuned("GPU", 8, 4096, 2048, 5) is None
        assert tuned_module.tuned("another", 4, 4096, 2048, 5) is None
    finally:
        tuned_module._measured.cache_clear()
        tuned_module.tuned.cache_clear()


def test_the_data_that_ships_can_be_read() -> None:
    for layers in json.loads(tuned_module.FILE.read_text()).values():
        for won in layers.values():
            for found in won.values():
                assert not found or read_setup(found)


def test_what_stands_around_must_fit() -> None:
    packed, x = pack_linear(weight(4, 48, 128, 32), DEVICE), inputs_of(3, 128, torch.bfloat16).to(DEVICE)
    with pytest.raises(ConfigError) as caught:
        low_bit_linear(x, packed, bias=torch.zeros(1, device=DEVICE))
    assert str(caught.value) == f"a layer was given bias (1,) on {x.device}; expected (48,) on {x.device}"
    with pytest.raises(ConfigError, match=r"residual \(1, 48\) on .*; expected \(3, 24\) on"):
        low_bit_linear(x, packed, residual=torch.zeros(1, 48, device=DEVICE), silu=True)
    with pytest.raises(ConfigError, match=r"norm.weight \(127,\) on .*; expected \(128,\) on"):
        low_bit_linear(x, packed, norm=Norm(torch.zeros(127, device=DEVICE), 1e-6))
    y = low_bit_linear(x.float().requires_grad_().to(x.dtype), packed, residual=torch.zeros(3, 48, device=DEVICE))
    assert y.dtype == torch.bfloat16
    assert not y.requires_grad


def test_inputs_of_another_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"was given \(2, 64\) on cpu for a layer of 128 inputs on cpu; expected \("):
        low_bit_linear(torch.zeros(2, 64), pack_linear(weight(4, 16, 128, 32)))


def test_setups_by_rule() -> None:
    assert setup_of(1, 32) == Setup(1, 1, 8, 4)
    assert setup_of(9, 32) == setup_of(16, 32) == Setup(2, 1, 8, 4)
    assert setup_of(64, 96) == setup_of(4000, 96) == Setup(8, 2, 4, 2)
    assert setup_of(1, 3) == Setup(1, 1, 3, 1)
    packed = pack_linear(weight(4, 16, 352, 352))
    defines = defines_of(packed, setup_of(1, 6), is_half=True, silu=True)
    assert (defines["GROUP"], defines["TAIL"], defines["HALF"], defines["SILU"], defines["WIDE"]) == (0, 1, 1, 1, 0)
