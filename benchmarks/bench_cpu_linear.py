"""One quantized linear layer on a CPU, y = x W^T: ours and others', and the time to only read the weight.

    python benchmarks/bench_cpu_linear.py               # -> benchmarks/results/cpu_linear.csv
    python benchmarks/bench_cpu_linear.py --shapes 4096x2048 --ms 1,16 --impls ours_int8,onnxruntime_l4,read

Case ``4096x2048_m16``: out x in, 16 rows of x. 4 bits, symmetric codes, one BF16 scale for 128 inputs. FP32 in and
out unless an implementation's line says otherwise. Metric ``us``: one product.

    ours_int8        kernels/low_bit_cpu.py: activations become bytes, a scale for each row and group
    ours_fp32        the same with exact=True: FP32 arithmetic on q s
    torch_int4pack   torch._weight_int4pack_mm_for_cpu, BF16 x and y: with FP32 ones it runs scalar code
    onnxruntime_l4   ONNX Runtime: com.microsoft MatMulNBits, accuracy_level 4 (activations become bytes)
    openvino         OpenVINO: i4 constants, converted and multiplied by FP32 scales before a MatMul; its own choice of
                     arithmetic, which may take activations of 8 bits and FP32 or BF16 ones
    torch_fp32       torch.nn.functional.linear on q s in FP32: eight times the bytes
    read             no product: read_bytes.c reads all bytes of ``ours`` (codes and FP32 scales) with as many threads
                     and adds them up. The floor of a layer that is bound by memory, measured in the same run

What is compared: every implementation has its own packed copies of 4-bit weights, more than 96 MB in all and three at
least, and no two copies have the same numbers (ONNX Runtime merges equal constants, and would then find its one weight
in the cache). A pass is one product with each of them; ``us`` is the time of a pass over the number of copies. At every
case all outputs of all copies are compared with FP64 first (``ALLOWED`` in cpu_peers.py), and a wrong one ends the
program.

Waiting threads: each library has a pool of its own whose idle threads stay awake for a while, on the cores that the
next one is about to need. So before every turn the program waits until all of its threads have slept for ten
milliseconds (its processor time stands still), then makes one pass that is not timed, which wakes the threads of this
implementation only, and times the next one. Nobody's threads disturb another's measurement, and everybody's may spin
for themselves as they do in their own programs. Turns are taken in rounds, so that other programs' load is the
same for all: ratios within a run are what counts, times of a shared machine are not. A line of output says how much
others took.

The column ``device`` is the processor, the threads, and the vector instructions that torch found; ``driver`` the
version of the package that an implementation comes from. onnx, onnxruntime and openvino are not dependencies of
grace-vlm; one that is not installed is said on standard error and has no rows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from bench_loss import Parser, numbers_in, say
from bench_w4linear import GROUP_SIZE, Shape, names_in, shapes_in, weight_bytes
from cpu_peers import ALLOWED, IMPLS, PACKAGES, Outputs, Passes, missing, panels
from read_bytes import Reader
from record import RESULTS, Row, place_of, row_of, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.kernels.cpu import why_not
from grace_vlm.quant.affine import dequantize, quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

SHAPES = "4096x2048,12288x2048,2048x6144,2048x2048"
MS = (1, 4, 16, 64)
NAMES = (*IMPLS, "read")
SCHEME = QuantScheme(4, GROUP_SIZE)
ROTATED_BYTES, MIN_COPIES = 96_000_000, 3
"""Three times the 32 MB of a last-level cache."""
STILL_SECONDS, STILL_SHARE, PATIENCE_SECONDS = 0.01, 0.05, 5.0
"""Threads sleep if they took less than this share of one core for so long; how long that is waited for."""


def num_copies(shape: Shape, bytes_of_one: int | None = None) -> int:
    """So many that they are ``ROTATED_BYTES``; by default of 4-bit weights."""
    return max(MIN_COPIES, math.ceil(ROTATED_BYTES / (bytes_of_one or weight_bytes(shape, SCHEME))))


def random_weights(shape: Shape, count: int) -> list[QuantizedTensor]:
    """Normal weights on their grids, each another one, the same every time; y then has about the variance of x."""
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(*shape, generator=generator) / math.sqrt(shape.in_features)
        made.append(quantize_tensor(weight, minmax_scale(weight, SCHEME), SCHEME))
    return made


def products(weights: Sequence[QuantizedTensor], x: torch.Tensor) -> list[torch.Tensor]:
    """x W^T of each, in FP64."""
    exact = (dequantize(weight.codes, weight.scale.double(), torch.float64) for weight in weights)
    return [x.double() @ weight.T for weight in exact]


def check(name: str, case: str, outputs: Outputs, expected: Sequence[torch.Tensor]) -> None:
    """``ValueError`` unless every copy's |y - x W^T| is at most ``ALLOWED`` of |x W^T|."""
    for number, (output, right) in enumerate(zip(outputs, expected, strict=True)):
        if output.shape != right.shape:
            raise ValueError(f"{case}: {name} is wrong: shape {tuple(output.shape)}, not {tuple(right.shape)}")
        error = float((output.double() - right).norm() / right.norm())
        if not error <= ALLOWED[name]:
            raise ValueError(
                f"{case}: {name} is wrong: relative error {error:.3g} of copy {number}, allowed {ALLOWED[name]}"
            )


def wait_until_still() -> None:
    """Return when all threads of this process sleep; ``RuntimeError`` if some never do."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        before, used = time.perf_counter(), time.process_time()
        time.sleep(STILL_SECONDS)
        if time.process_time() - used < STILL_SHARE * (time.perf_counter() - before):
            return
    raise RuntimeError(f"threads of this process are awake after {PATIENCE_SECONDS:g} seconds without work")


def timed_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one pass of each, taken in turns; threads of the others sleep meanwhile."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wait_until_still()
            run()
            started = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - started)
    return samples


def measure_shape(args: argparse.Namespace, shape: Shape, place: Row) -> None:
    """All numbers of rows at one shape; the rows of the CSV are written after each."""
    weights = random_weights(shape, num_copies(shape))
    all_x = torch.randn(max(args.ms), shape.in_features, generator=torch.Generator().manual_seed(0))
    all_expected = products(weights, all_x)
    counts = {name: len(weights) for name in args.impls}
    if "torch_fp32" in counts:
        counts["torch_fp32"] = num_copies(shape, 4 * shape.out_features * shape.in_features)
    passes: dict[str, Passes] = {
        name: IMPLS[name](weights[: counts[name]], args.threads) for name in args.impls if name != "read"
    }
    packed = panels(weights) if "read" in counts else []
    for num_rows in args.ms:
        case = shape.case(num_rows)
        runs: dict[str, Callable[[], object]] = {}
        for name in args.impls:
            if name == "read":
                runs[name] = Reader(tuple(part for one in packed for part in (one.codes, one.scale)), args.threads)
                continue
            run = passes[name](all_x[:num_rows])
            check(name, case, run(), [one[:num_rows] for one in all_expected[: counts[name]]])
            runs[name] = run
        before, started = busy_seconds(), time.perf_counter()
        samples = timed_turns(runs, args.rounds)
        others = (busy_seconds() - before) / (time.perf_counter() - started) / args.threads
        rows = []
        for name, seconds in samples.items():
            us = [1e6 * one / counts[name] for one in seconds]
            rows.append(row_of("cpu_linear", case, name, "us", us, "us", {**place, "driver": versions(name)}))
        write_rows(args.out, rows)
        medians = [f"{row['impl']} {float(row['p50']):.0f}" for row in rows]
        print(f"{case}: {', '.join(medians)} us; other programs took {others:.0%} of {args.threads} cores", flush=True)


def busy_seconds() -> float:
    """Processor time that other processes of this machine ever took; 0 where there is no /proc/stat (not on Linux)."""
    with contextlib.suppress(OSError):
        words = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, words[:8])
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
    return 0.0


def versions(name: str) -> str:
    """Of the packages that torch does not bring."""
    return " ".join(f"{one} {importlib.metadata.version(one)}" for one in PACKAGES.get(name, ()))


def processor(num_threads: int) -> str:
    """For example ``AMD EPYC, 2 threads, AVX512``."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {num_threads} thread{'s' * (num_threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"


def present(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are installed."""
    for name in names:
        if lacks := missing(name):
            say(f"{name}: {' and '.join(lacks)} not installed, so it has no rows")
    return [name for name in names if not missing(name)]


def parser() -> Parser:
    made = Parser(prog="bench_cpu_linear.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", default=SHAPES, help="OUTxIN with commas; default: %(default)s")
    made.add_argument("--ms", help=f"numbers of rows; default: {','.join(map(str, MS))}")
    made.add_argument("--impls", default=",".join(NAMES), help="default: %(default)s")
    made.add_argument("--rounds", type=int, default=25, help="timed passes of each; default: %(default)s")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's, the cores")
    made.add_argument("--out", type=Path, default=RESULTS / "cpu_linear.csv", help="CSV whose rows are replaced")
    return made


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments; ``shapes`` are ``Shape``, ``ms`` integers, ``impls`` those that can run."""
    made = parser()
    args = made.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        made.error("--rounds and --threads must be at least 1")
    args.ms = numbers_in(made, "--ms", args.ms, MS, "")
    args.shapes = shapes_in(made, args.shapes)
    names = names_in(made, args.impls, NAMES)
    needs_panels = {"ours_int8", "ours_fp32", "read"} & {*names}
    if needs_panels and (reason := why_not()):
        made.error(f"{min(needs_panels)} cannot run here: {reason}")
    try:
        for shape in args.shapes:
            SCHEME.check(shape.out_features, shape.in_features, str(shape))
    except (ConfigError, OSError, ValueError) as error:
        made.error(str(error))
    made.require_rows(args.out)
    args.impls = present(names)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = settings(argv)
    place = {**place_of(torch.device("cpu")), "device": processor(args.threads)}
    for shape in args.shapes:
        measure_shape(args, shape, place)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
