"""bench_w4linear.py on a CPU: names, bytes, what each peer is given, wrong and missing implementations, its rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_w4linear as bench  # noqa: E402
import record  # noqa: E402

from grace_vlm.quant.affine import dequantize  # noqa: E402
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme  # noqa: E402

CPU = torch.device("cpu")
SHAPE = bench.Shape(96, 256)


def every_code(num_bits: int, group_size: int = 128) -> QuantizedTensor:
    """Random codes of the whole range, -2^(b-1) included, and a scale of its own for every group."""
    generator = torch.Generator().manual_seed(num_bits)
    scheme = QuantScheme(num_bits, group_size)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, SHAPE, generator=generator).to(torch.int8)
    codes[0, :2] = torch.tensor([scheme.qmin, scheme.qmax])
    scale = torch.rand(SHAPE.out_features, SHAPE.in_features // group_size, generator=generator) + 0.01
    return QuantizedTensor(codes, scale.bfloat16(), scheme)


def exact(tensor: QuantizedTensor) -> torch.Tensor:
    return dequantize(tensor.codes, tensor.scale.double(), torch.float64)


def test_names_of_cases() -> None:
    assert bench.Shape(4096, 2048).case(1) == "4096x2048_m1"
    assert bench.Shape(22016, 4096).case(1024, 64) == "22016x4096_m1024_g64"
    args = bench.settings(["--device", "cpu", "--impls", "bf16"])
    assert [str(shape) for shape in args.shapes] == bench.SHAPES.split(",")
    assert args.ms == [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]


def test_bytes_of_the_floor() -> None:
    w4, w8 = QuantScheme(4, 128), QuantScheme(8, 128)
    assert bench.weight_bytes(bench.Shape(4096, 2048), w4) == 4096 * 2048 // 2 + 4096 * 16 * 2
    assert bench.weight_bytes(bench.Shape(4096, 2048), w8) == 4096 * 2048 + 4096 * 16 * 2
    tensor = every_code(4)
    moved = bench.floor(tensor)(torch.empty(0))
    assert 2 * moved.numel() * moved.element_size() == tensor.codes.numel() // 2 + 2 * tensor.scale.numel()


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("impl", list(bench.IMPLS))
def test_copies_do_not_fit_in_the_cache(impl: str, num_bits: int) -> None:
    scheme = QuantScheme(num_bits, 128)
    for word in bench.SHAPES.split(","):
        shape = bench.Shape(*map(int, word.split("x")))
        copies = bench.num_copies(impl, shape, scheme)
        read = 2 * shape.out_features * shape.in_features if impl == "bf16" else bench.weight_bytes(shape, scheme)
        assert copies * read >= 160e6
        assert copies >= 8
    assert bench.num_copies("ours", bench.Shape(4096, 2048), QuantScheme(4, 128)) == 37


def test_the_random_weight_is_the_same_every_time_and_on_its_grid() -> None:
    first, again = (bench.random_weight(SHAPE, QuantScheme(4, 128), CPU) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert (int(first.codes.min()), int(first.codes.max())) == (-7, 7)
    assert float(exact(first).std()) * SHAPE.in_features**0.5 == pytest.approx(1, abs=0.05)


def test_tinygemm_by_hand() -> None:
    tensor = every_code(4)
    nibbles, scales_and_zeros = bench.tinygemm_tensors(tensor)
    assert nibbles.dtype == torch.uint8
    assert nibbles.is_contiguous()
    assert scales_and_zeros.shape == (2, SHAPE.out_features, 2)
    assert scales_and_zeros.is_contiguous()
    unsigned = torch.empty(SHAPE, dtype=torch.float64)
    unsigned[:, 0::2], unsigned[:, 1::2] = (nibbles >> 4).double(), (nibbles & 15).double()
    scale, zero = (scales_and_zeros[..., k].double().T.repeat_interleave(128, dim=1) for k in (0, 1))
    assert torch.equal((unsigned - 8) * scale + zero, exact(tensor))


def test_tinygemm_by_the_operator_of_torch() -> None:
    """Its CPU twin takes other codes, but the same scales and zeros and the same formula."""
    tensor = every_code(4)
    _, scales_and_zeros = bench.tinygemm_tensors(tensor)
    packed = torch._convert_weight_to_int4pack_for_cpu(tensor.codes.int() + 8, 2)
    x = torch.randn(5, SHAPE.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    output = torch._weight_int4pack_mm_for_cpu(x, packed, 128, scales_and_zeros)
    bench.check("tinygemm", "here", output, x, exact(tensor))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_humming_by_hand(num_bits: int) -> None:
    tensor = every_code(num_bits)
    given = bench.humming_tensors(tensor)
    words = given["weight"].long() & 0xFFFF_FFFF
    assert given["weight"].dtype == torch.int32
    assert given["weight"].shape == (SHAPE.out_features, SHAPE.in_features * num_bits // 32)
    assert given["weight_scale"].dtype == torch.bfloat16
    unsigned = torch.stack([words >> shift & (1 << num_bits) - 1 for shift in range(0, 32, num_bits)], dim=-1).flatten(
        1
    )
    scale = given["weight_scale"].double().repeat_interleave(128, dim=1)
    assert torch.equal((unsigned - (1 << (num_bits - 1))) * scale, exact(tensor))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_gemlite_by_hand(num_bits: int) -> None:
    tensor = every_code(num_bits)
    codes, scale, zero_point = bench.gemlite_tensors(tensor)
    assert (codes.dtype, zero_point) == ((torch.uint8, 8) if num_bits == 4 else (torch.int8, None))
    assert scale.shape == (SHAPE.out_features, 2)
    value = (codes.double() - (zero_point or 0)) * scale.double().repeat_interleave(128, dim=1)
    assert torch.equal(value, exact(tensor))


def test_a_copy_is_in_memory_of_its_own() -> None:
    tensor = every_code(8)
    copy = bench.own(tensor)
    assert torch.equal(copy.codes, tensor.codes)
    assert torch.equal(copy.scale, tensor.scale)
    assert copy.codes.data_ptr() != tensor.codes.data_ptr()
    assert copy.scale.data_ptr() != tensor.scale.data_ptr()


def test_bf16_passes_and_what_is_wrong_is_named() -> None:
    tensor = every_code(4)
    x = torch.randn(40, SHAPE.in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
    right = bench.bf16(tensor)(x)
    bench.check("bf16", "case", right, x, exact(tensor))
    wrong = right.clone()
    wrong[39, 7] = float("nan")
    for output in (right * 1.03, wrong, torch.zeros_like(right)):
        with pytest.raises(ValueError, match=r"^case: gemlite is wrong: relative error .*, allowed 0\.02$"):
            bench.check("gemlite", "case", output, x, exact(tensor))
    with pytest.raises(ValueError, match=r"^case: gemlite is wrong: shape \(96, 40\), not \(40, 96\)$"):
        bench.check("gemlite", "case", right.T, x, exact(tensor))


def test_peers_that_are_missing_or_have_no_such_bits(capsys: pytest.CaptureFixture[str]) -> None:
    there = [name for name in ("humming", "gemlite") if importlib.util.find_spec(name) is not None]
    assert bench.present(["bf16", "tinygemm", "humming", "gemlite", "ours"], 8) == ["bf16", *there, "ours"]
    absent = [name for name in ("humming", "gemlite") if name not in there]
    assert capsys.readouterr().err.splitlines() == [
        "tinygemm: it has no 8-bit weights, so it has no rows",
        *(f"{name}: it is not installed, so it has no rows" for name in absent),
    ]


def test_a_peer_that_fails_is_skipped_and_ours_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    tensor = every_code(4)
    # Its packing operator has no CPU kernel.
    assert bench.tried("tinygemm", "96x256", lambda: bench.tinygemm(tensor)) is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("96x256: tinygemm is skipped: Could not run 'aten::_convert_weight_to_int4pack'")

    def fail() -> None:
        raise AssertionError

    assert bench.tried("humming", "96x256_m1", fail) is None
    assert capsys.readouterr().err == "96x256_m1: humming is skipped: AssertionError\n"
    with pytest.raises(AssertionError):
        bench.tried("ours", "96x256_m1", fail)


def test_rows_and_lines_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROTATED_BYTES", 1)  # no cache to get past: eight copies are enough
    out = tmp_path / "w4.csv"
    run = ["--device", "cpu", "--shapes", "96x256,64x128", "--impls", "bf16,tinygemm,floor", "--out", str(out)]
    for _ in range(2):  # the second run's rows take the place of the first's
        assert bench.main([*run, "--ms", "1,3", "--replays", "4"]) == 0
    rows = record.read_rows(out)
    cases = ["96x256_m1", "96x256_m3", "64x128_m1", "64x128_m3"]
    assert [(row["case"], row["impl"]) for row in rows] == [(c, i) for c in cases for i in ("bf16", "floor")]
    assert {(row["bench"], row["metric"], row["unit"], row["device"]) for row in rows} == {
        ("w4_linear", "us", "us", "cpu")
    }
    assert all(0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    said = capsys.readouterr()
    lines = said.out.splitlines()[-4:]
    assert [line.split(":")[0] for line in lines] == cases
    assert lines[0] == f"96x256_m1: bf16 {float(rows[0]['p50']):.2f}, floor {float(rows[1]['p50']):.2f} us"
    assert said.err.count("tinygemm is skipped") == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--shapes", "4096"), "--shapes has a word that is no OUTxIN, for example 4096x2048"),
        (("--ms", "1,x"), "--ms has 'x'; expected NUMBER, for example 1"),
        (("--impls", "ours,marlin"), f"--impls 'marlin' is no implementation; there are {', '.join(bench.IMPLS)}"),
        (("--group", "0"), "--group and --replays must be at least 1"),
        (("--shapes", "64x192"), "group size 128 does not divide in_features 192 of 64x192; use w4g64"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
