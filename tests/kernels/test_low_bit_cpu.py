"""The low-bit linear layer on a CPU against FP64 of q s: shapes that fill nothing, threads, forks, compilers."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_bit_cases import error, exact, inputs_of, weight

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import cpu as module
from grace_vlm.kernels.cpu import library, why_not
from grace_vlm.kernels.low_bit_cpu import pack_panels, panel_linear
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.scheme import QuantizedTensor

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
SHAPES = [(1, 32, 32), (5, 64, 32), (7, 96, 32), (48, 192, 96), (33, 256, 128), (64, 576, 64), (16, 352, 352)]


def is_right(y: torch.Tensor, x: torch.Tensor, tensor: QuantizedTensor, is_exact: bool, bias: float = 0.0) -> bool:
    """Element by element: half a step an input for activations in bytes, and what FP32 sums round."""
    group = x.shape[1] // tensor.scale.shape[1]
    groups = x.view(len(x), -1, group)
    step = groups.abs().amax(-1, keepdim=True).expand_as(groups).reshape(x.shape) / 127
    size = dequantize(tensor.codes, tensor.scale, torch.float32).abs().T
    allowed = 1e-5 * (x.abs() @ size) + 1e-6 * (1 + abs(bias)) + (0.0 if is_exact else 0.505 * step @ size)
    return bool(((y - exact(x, tensor) - bias).abs() <= allowed).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_both_ways(bits: int, out: int, inputs: int, group: int) -> None:
    tensor = weight(bits, out, inputs, group, wide=out % 2 == 1)
    packed, bias = pack_panels(tensor), torch.full((out,), 0.75)
    for tokens in (1, 2, 3, 8, 9, 17):
        x = inputs_of(tokens, inputs, torch.float32)
        for is_exact in (False, True):
            for threads in (1, 2, 3):
                y = panel_linear(x, packed, bias=bias, exact=is_exact, threads=threads)
                assert is_right(y, x, tensor, is_exact, 0.75)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_activations_are_what_they_are_said_to_be(bits: int) -> None:
    """127 steps to the largest of a group, half to even; then exact."""
    tensor, x = weight(bits, 24, 256, 64), inputs_of(5, 256, torch.float32)
    groups = x.view(5, 4, 64)
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / step).round() * step).view(5, 256)
    found = panel_linear(x, pack_panels(tensor))
    # A product that lies on a half may be rounded to either side: 127 / largest is a rounded number too.
    assert error(found, exact(rounded, tensor)) < 1e-3
    assert error(panel_linear(rounded, pack_panels(tensor)), exact(rounded, tensor)) < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 8]), st.integers(1, 40), st.integers(1, 6), st.sampled_from([32, 64, 96, 128]),
    st.integers(0, 20), st.booleans(), st.integers(1, 4),
)  # fmt: skip
def test_any_shape(bits: int, out: int, groups: int, group: int, tokens: int, is_exact: bool, threads: int) -> None:
    tensor, x = weight(bits, out, groups * group, group), inputs_of(tokens, groups * group, torch.float32)
    y = panel_linear(x, pack_panels(tensor), exact=is_exact, threads=threads)
    assert y.shape == (tokens, out)
    assert not tokens or is_right(y, x, tensor, is_exact)


def test_nothing_is_written_outside_and_addresses_may_be_odd() -> None:
    """x, bias and y at multiples of 4 bytes, in the middle of memory full of NaN."""
    tensor = weight(4, 13, 96, 32)
    packed = pack_panels(tensor)
    for is_exact in (0, 1):
        given, taken = torch.full((1 + 3 * 96 + 40,), float("nan")), torch.full((3 + 3 * 13 + 9,), -7.0)
        x = given[1 : 1 + 3 * 96]
        x.copy_(inputs_of(3, 96, torch.float32).flatten())
        y = taken[3 : 3 + 3 * 13]
        library().low_bit_linear(
            *(ctypes.c_void_p(t.data_ptr()) for t in (packed.codes, packed.scale, x)), None, None, None,
            ctypes.c_void_p(y.data_ptr()),
            *(ctypes.c_long(n) for n in (3, 13, 96, 32)), ctypes.c_float(0.0), 4, is_exact, ctypes.c_long(2),
        )  # fmt: skip
        assert error(y.view(3, 13), exact(x.view(3, 96), tensor)) < 1.5e-2
        assert (taken[:3] == -7).all()
        assert (taken[3 + 3 * 13 :] == -7).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen(value: float) -> None:
    packed, x = pack_panels(weight(4, 8, 64, 32)), inputs_of(2, 64, torch.float32)
    x[1, 40] = value
    for is_exact in (False, True):
        y = panel_linear(x, packed, exact=is_exact)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()


def test_callers_do_not_disturb_each_other() -> None:
    tensors = [weight(4, 64, 128, 64, seed=seed) for seed in range(4)]
    packed, x = [pack_panels(t) for t in tensors], inputs_of(3, 128, torch.float32)
    right = [panel_linear(x, p, threads=1) for p in packed]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            found = list(pool.map(lambda p: panel_linear(x, p, threads=3), packed))
            assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def _in_a_child(queue: object) -> None:
    y = panel_linear(inputs_of(2, 128, torch.float32), pack_panels(weight(4, 64, 128, 64)), threads=2)
    queue.put(y.tolist())  # type: ignore[attr-defined]


def test_a_forked_child_has_threads_of_its_own() -> None:
    right = panel_linear(inputs_of(2, 128, torch.float32), pack_panels(weight(4, 64, 128, 64)), threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    found = queue.get(timeout=60)
    child.join(60)
    assert torch.equal(torch.tensor(found), right)


def test_two_first_uses_at_once(tmp_path: Path) -> None:
    code = "import torch; from grace_vlm.kernels.cpu import library; library(); print('loaded')"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)
    ]
    assert [child.communicate(timeout=120)[0].strip() for child in children] == [b"loaded", b"loaded"]
    assert len(list((tmp_path / "grace_vlm" / "cpu").iterdir())) == 1


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    library.cache_clear()
    assert error(panel_linear(torch.ones(1, 64), pack_panels(weight(4, 8, 64, 32))),
                 exact(torch.ones(1, 64), weight(4, 8, 64, 32))) < 1e-2  # fmt: skip
    library.cache_clear()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="a weight of 3 bits in groups of 32 has no fast kernel on a CPU; expected 4 or"
    ):
        pack_panels(weight(3, 8, 64, 32))
    with pytest.raises(ConfigError, match=r"was given \(2, 64\) in torch.bfloat16 for a layer of 64 inputs; expected"):
        panel_linear(torch.zeros(2, 64, dtype=torch.bfloat16), pack_panels(weight(4, 8, 64, 32)))
    monkeypatch.setattr(module, "_compiler", lambda: None)
    library.cache_clear()
    with pytest.raises(ConfigError) as caught:
        library()
    library.cache_clear()
    assert str(caught.value) == "no INT4 kernel on this CPU: there is no C compiler (cc or gcc)"


def test_with_and_without_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are exact: what has no VNNI computes the same bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, results = inputs_of(9, 256, torch.float32), []
    for capability in ("", "avx2"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        assert ("-march=x86-64-v3" in module.flags()) == (capability == "avx2")
        library.cache_clear()
        results.append([panel_linear(x[:n], pack_panels(weight(b, 40, 256, 64))) for b in (4, 8) for n in (1, 9)])
    library.cache_clear()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results, strict=True))


def test_torch_has_its_threads_again_whoever_leaves_last() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = module.alone(), module.alone()
        first.__enter__()
        second.__enter__()
        assert (torch.get_num_threads(), module.num_threads()) == (1, 2)
        first.__exit__(None, None, None)
        assert (torch.get_num_threads(), module.num_threads()) == (1, 2)
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), module.alone():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_two_threads_have_their_own_numbers() -> None:
    barrier, found = threading.Barrier(2), {}

    def work(name: str, leaves_first: bool) -> None:
        torch.get_num_threads()  # torch's first look sets a thread's number to the one that was set last anywhere
        torch.set_num_threads(2)
        barrier.wait(60)
        with module.alone():
            barrier.wait(60)
            if not leaves_first:
                barrier.wait(60)
        after = torch.get_num_threads(), module.num_threads()
        if leaves_first:
            barrier.wait(60)
        found[name] = after

    threads = [threading.Thread(target=work, args=(name, name == "a")) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {"a": (2, 2), "b": (2, 2)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whatever_torchs_default_dtype_is(dtype: torch.dtype) -> None:
    tensor, x = weight(4, 40, 64, 32), inputs_of(3, 64, torch.float32)
    right = panel_linear(x, pack_panels(tensor))
    torch.set_default_dtype(dtype)
    try:
        found = panel_linear(x, pack_panels(tensor))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, right)
