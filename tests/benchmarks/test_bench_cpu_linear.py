"""bench_cpu_linear.py: copies that differ and fill no cache, what peers are given, wrong ones, its rows."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_cpu_linear as bench  # noqa: E402
import cpu_peers  # noqa: E402
import read_bytes  # noqa: E402
import record  # noqa: E402

from grace_vlm.kernels.cpu import why_not  # noqa: E402

pytestmark = pytest.mark.skipif(why_not() is not None, reason="no kernel on this processor")
SHAPE = bench.Shape(96, 256)


@pytest.fixture(scope="module")
def weights() -> list[bench.QuantizedTensor]:
    made = bench.random_weights(SHAPE, 3)
    made[0].codes[0, :2] = torch.tensor([-8, 7])  # both ends of the range
    return made


def test_copies_do_not_fit_in_the_cache() -> None:
    for word in bench.SHAPES.split(","):
        shape = bench.Shape(*map(int, word.split("x")))
        assert bench.num_copies(shape) * bench.weight_bytes(shape, bench.SCHEME) >= 96e6
        assert bench.num_copies(shape) >= 3
    assert bench.num_copies(bench.Shape(4096, 2048)) == 23
    assert bench.num_copies(bench.Shape(4096, 2048), 4 * 4096 * 2048) == 3


def test_no_two_copies_have_the_same_numbers(weights: list[bench.QuantizedTensor]) -> None:
    for k, one in enumerate(weights):
        for other in weights[:k]:
            assert not torch.equal(one.codes, other.codes)
            assert not torch.equal(one.scale, other.scale)
    again = bench.random_weights(SHAPE, 3)
    assert all(torch.equal(one.scale, other.scale) for one, other in zip(weights, again, strict=True))


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("name", list(cpu_peers.IMPLS))
def test_every_implementation_that_is_here_multiplies(
    name: str, num_rows: int, weights: list[bench.QuantizedTensor]
) -> None:
    if lacks := cpu_peers.missing(name):
        pytest.skip(f"{lacks} not installed")
    x = torch.randn(num_rows, SHAPE.in_features, generator=torch.Generator().manual_seed(1))
    bench.check(name, "here", cpu_peers.IMPLS[name](weights, 2)(x)(), bench.products(weights, x))


def test_bytes_of_onnx_and_openvino_by_hand(weights: list[bench.QuantizedTensor]) -> None:
    codes = weights[0].codes
    onnx = cpu_peers.onnx_bytes(weights[0])
    assert onnx.shape == (96, 2, 64)
    back = torch.stack([onnx & 15, onnx >> 4], dim=-1).to(torch.int8).view(SHAPE) - 8
    assert torch.equal(back, codes)
    i4 = cpu_peers.openvino_bytes(weights[0])
    assert i4.shape == (96, 128)
    signed = torch.stack([i4 & 15, i4 >> 4], dim=-1).to(torch.int8).view(SHAPE)
    assert torch.equal(torch.where(signed > 7, signed - 16, signed), codes)


def test_the_copy_that_is_wrong_is_named(weights: list[bench.QuantizedTensor]) -> None:
    x = torch.randn(4, SHAPE.in_features, generator=torch.Generator().manual_seed(2))
    right = bench.products(weights, x)
    bench.check("ours_fp32", "case", right, right)
    slightly = [right[0], right[1], right[2] * 1.001]
    bench.check("torch_int4pack", "case", slightly, right)
    with pytest.raises(ValueError, match=r"^case: ours_fp32 is wrong: relative error 0.001 of copy 2, allowed 1e-05$"):
        bench.check("ours_fp32", "case", slightly, right)
    merged = [right[0], right[0], right[2]]  # what merged constants would give
    with pytest.raises(ValueError, match=r"^case: openvino is wrong: relative error .* of copy 1, allowed 0\.02$"):
        bench.check("openvino", "case", merged, right)
    with pytest.raises(ValueError, match=r"of copy 0, allowed 0\.02$"):
        bench.check("openvino", "case", [right[0] * float("nan"), *right[1:]], right)
    with pytest.raises(ValueError, match=r"^case: openvino is wrong: shape \(96, 4\), not \(4, 96\)$"):
        bench.check("openvino", "case", [one.T for one in right], right)
    with pytest.raises(ValueError, match="zip"):
        bench.check("openvino", "case", right[:2], right)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_byte_is_read(num_threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 8, 63, 64, 65, 4096, 256 * 1024, 256 * 1024 + 9, 700_000)
    stretches = [torch.randint(256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]

    def expected() -> int:
        total = 0
        for one in stretches:
            words = one[: len(one) // 64 * 64].view(torch.int64).tolist()
            total += sum(words) + int(one[len(words) * 8 :].sum())
        return total % 2**64

    read = read_bytes.Reader(tuple(stretches), num_threads)
    assert read() == expected()
    stretches[-1][-1] += 1
    stretches[6][0] ^= 1
    assert read() == expected()
    with pytest.raises(ValueError, match="64 bytes"):
        read_bytes.Reader((stretches[-1][1:],), num_threads)


def test_a_turn_waits_for_threads_that_are_awake() -> None:
    stop = time.perf_counter() + 0.15

    def spin() -> None:
        while time.perf_counter() < stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    bench.wait_until_still()
    assert time.perf_counter() >= stop
    thread.join()


def test_threads_that_never_sleep_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PATIENCE_SECONDS", 0.05)
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match=r"awake after 0\.05 seconds"):
            bench.wait_until_still()
    finally:
        done.set()
        thread.join()


def test_rows_and_lines_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROTATED_BYTES", 1)  # no cache to get past: three copies are enough
    out = tmp_path / "cpu.csv"
    run = ["--shapes", "96x256,64x128", "--impls", "ours_int8,torch_fp32,read", "--out", str(out), "--threads", "2"]
    for _ in range(2):  # the second run's rows take the place of the first's
        assert bench.main([*run, "--ms", "1,3", "--rounds", "2"]) == 0
    rows = record.read_rows(out)
    cases = ["96x256_m1", "96x256_m3", "64x128_m1", "64x128_m3"]
    impls = ("ours_int8", "torch_fp32", "read")
    assert [(row["case"], row["impl"]) for row in rows] == [(c, i) for c in cases for i in impls]
    assert {(row["bench"], row["metric"], row["unit"]) for row in rows} == {("cpu_linear", "us", "us")}
    assert all(", 2 threads, " in row["device"] for row in rows)
    assert all(0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(":")[0] for line in lines] == cases


def test_what_is_not_installed_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu_peers.PACKAGES, "openvino", ("no_such_package",))
    assert bench.present(["ours_int8", "openvino", "read"]) == ["ours_int8", "read"]
    assert capsys.readouterr().err == "openvino: no_such_package not installed, so it has no rows\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--shapes", "4096"), "--shapes has a word that is no OUTxIN, for example 4096x2048"),
        (("--ms", "1,x"), "--ms has 'x'; expected NUMBER, for example 1"),
        (("--impls", "ours_int8,ggml"), f"--impls 'ggml' is no implementation; there are {', '.join(bench.NAMES)}"),
        (("--rounds", "0"), "--rounds and --threads must be at least 1"),
        (("--shapes", "64x192"), "group size 128 does not divide in_features 192 of 64x192; use w4g64"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(list(arguments))
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
