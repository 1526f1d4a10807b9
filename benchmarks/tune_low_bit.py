"""Measure how the low-bit kernels are best compiled on this GPU, and write it down (needs a CUDA GPU with NVRTC).

    python benchmarks/tune_low_bit.py                          # -> src/grace_vlm/kernels/tuned.json, this GPU's entry
    python benchmarks/tune_low_bit.py --bits 4 --shapes 4096x2048 --tokens 8,64

For every layer and number of tokens: setups of ``low_bit_linear.cu`` (up to 64 tokens), or torch on bf16(q s) (more),
and of ``low_bit_tiles.cu`` (more than 8). Each is compared with FP64 first; a wrong one ends the program. Weights
rotate as in ``bench_w4linear.py``; the shortest median wins. Texts are compiled ahead by all processors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from bench_loss import release, say
from bench_w4linear import SHAPES, Shape, check, num_copies, random_weight, replayed
from record import percentiles, time_interleaved

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import low_bit_linear as operator
from grace_vlm.kernels import starts_early
from grace_vlm.kernels.fragments import SLAB, PackedLinear, pack_linear
from grace_vlm.kernels.low_bit_cuda import (
    FEW_TOKENS,
    Setup,
    TileSetup,
    defines_of,
    run_few,
    run_many,
    tile_defines_of,
    tile_microseconds,
    tile_setups,
)
from grace_vlm.kernels.nvrtc import FOLDER, compile_text
from grace_vlm.kernels.tuned import FILE
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.scheme import QuantScheme

FEW, MANY = (1, 8, 16, 32, 64), (128, 256, 512, 1024, 4096)
"""Numbers of tokens: each stands for those below it."""
GROUP_SIZE, ROUNDS, LIKELY = 128, 15, 10
SHARED_BYTES = 48 << 10
"""Of a block, without asking for more."""
Candidate = Setup | TileSetup | None
"""None: torch on bf16(q s)."""


def few_setups(num_tokens: int, num_slabs: int) -> Iterator[Setup]:
    """All that fit: shared memory for the sums of all warps, and no warp without work."""
    eights = next(n for n in (1, 2, 4, 8) if num_tokens <= 8 * n)
    for rows, warps, depth in itertools.product((1, 2), (4, 8, 16), (2, 4, 8)):
        fits = 4 * warps * 8 * eights * (16 * rows + 4) <= SHARED_BYTES
        if fits and rows * eights <= 16 and warps * depth <= max(num_slabs, 2) and eights * depth <= 16:
            yield Setup(eights, rows, warps, depth)


def candidates(num_tokens: int, packed: PackedLinear, thorough: bool) -> list[Candidate]:
    """What is tried: the kernel for few tokens, or torch for many; and on a Hopper GPU tiles, of which only the
    likeliest unless ``thorough``. There the kernel for few tokens never won at 64."""
    is_few = num_tokens <= FEW_TOKENS
    few: list[Candidate] = list(few_setups(num_tokens, -(-packed.in_features // SLAB))) if is_few else [None]
    if torch.cuda.get_device_capability() != (9, 0):
        return few
    processors = torch.cuda.get_device_properties(packed.device).multi_processor_count
    layer = (num_tokens, packed.out_features, packed.in_features, processors)
    tiles = sorted(tile_setups(num_tokens), key=lambda setup: tile_microseconds(setup, *layer))
    if thorough:
        return [*few, *tiles]
    if num_tokens <= 8:
        return few
    return [*(() if FEW_TOKENS <= num_tokens <= 512 else few), *tiles[:LIKELY]]


def text_of(packed: PackedLinear, setup: Candidate) -> tuple[str, dict[str, int]] | None:
    """(file, macros) that a candidate needs compiled."""
    if isinstance(setup, Setup):
        found = ("low_bit_linear.cu", defines_of(packed, setup, is_half=False, silu=False))
    elif isinstance(setup, TileSetup):
        found = ("low_bit_tiles.cu", tile_defines_of(packed, setup, is_half=False, silu=False))
    else:
        return None
    macros = found[1] | {"EARLY_START": starts_early(packed.device)}
    return found[0], {name: int(value) for name, value in macros.items()}


def compile_one(architecture: str, job: tuple[str, dict[str, int]]) -> str | None:
    """What the compiler says if it cannot."""
    file, defines = job
    try:
        compile_text((FOLDER / file).read_text(encoding="utf-8"), architecture, defines)
    except ConfigError as error:
        return f"{file} {defines}: {error}"
    return None


def compile_all(jobs: Sequence[tuple[str, dict[str, int]]]) -> None:
    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    # New processes: a copy of one that uses a GPU may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(32, os.cpu_count() or 1), mp_context=context) as pool:
        for said in pool.map(partial(compile_one, architecture), jobs):
            if said:
                say(said)


def runner(setup: Candidate, packed: PackedLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(setup, Setup):
        return lambda x: run_few(setup, x, packed)
    if isinstance(setup, TileSetup):
        return lambda x: run_many(setup, x, packed)
    return lambda x: operator._dense(x, packed, None)


def best(
    name: str, num_tokens: int, copies: Sequence[PackedLinear], exact: torch.Tensor, setups: Sequence[Candidate]
) -> tuple[Candidate, float]:
    """The fastest candidate and its microseconds."""
    x = torch.randn(num_tokens, exact.shape[1], device=exact.device).bfloat16()
    runs = {}
    for setup in setups:
        linears = [runner(setup, packed) for packed in copies]
        try:
            y = linears[0](x)
        except ConfigError as error:  # it does not compile or launch
            say(f"{name} {setup}: {error}")
            continue
        check(str(setup), name, y, x, exact)
        runs[setup] = replayed(f"{name} {setup}", linears, x)
    samples = time_interleaved({str(setup): run for setup, run in runs.items()}, exact.device, ROUNDS, 2)
    times = {setup: 1000 * percentiles(samples[str(setup)])[1] / len(copies) for setup in runs}
    winner = min(times, key=lambda setup: times[setup])
    ranked = sorted(times.items(), key=lambda item: item[1])[:5]
    print(f"{name} m{num_tokens}: " + ", ".join(f"{setup} {us:.2f} us" for setup, us in ranked), flush=True)
    return winner, times[winner]


def tune(
    bits: int, shape: Shape, tokens: Sequence[int], device: torch.device, thorough: bool
) -> dict[str, dict[str, int]]:
    """What won for one layer, as ``tuned.json`` has it."""
    scheme = QuantScheme(bits, GROUP_SIZE)
    tensor = random_weight(shape, scheme, device)
    exact = dequantize(tensor.codes, tensor.scale.double(), torch.float64)
    copies = [pack_linear(tensor, device) for _ in range(num_copies("ours", shape, scheme))]
    setups = {num_tokens: candidates(num_tokens, copies[0], thorough) for num_tokens in tokens}
    wanted = [text_of(copies[0], setup) for some in setups.values() for setup in some]
    compile_all([job for job in wanted if job is not None])
    found: dict[str, dict[str, int]] = {}
    for num_tokens in tokens:
        winner, _ = best(f"w{bits} {shape}", num_tokens, copies, exact, setups[num_tokens])
        found[str(num_tokens)] = {} if winner is None else asdict(winner)
        release(device)
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--bits", type=int, nargs="*", default=[4, 8], choices=(4, 8))
    made.add_argument("--shapes", default=SHAPES, help="OUTxIN with commas")
    made.add_argument("--tokens", default=",".join(map(str, FEW + MANY)), help="with commas")
    made.add_argument("--thorough", action="store_true", help="every setup that fits, not only the likeliest")
    made.add_argument("--out", type=Path, default=FILE)
    args = made.parse_args()
    device, gpu = torch.device("cuda"), torch.cuda.get_device_name()
    tokens = [int(word) for word in args.tokens.split(",")]
    for bits in args.bits:
        for text in args.shapes.split(","):
            out, inputs = map(int, text.split("x"))
            won = tune(bits, Shape(out, inputs), tokens, device, args.thorough)
            content = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
            layers = content.setdefault(gpu, {})
            layers.setdefault(f"w{bits} {text}", {}).update(won)
            args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            release(device)


if __name__ == "__main__":
    main()
