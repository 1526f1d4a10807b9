"""One quantized linear layer, y = x W^T: packed integers of ours and of others, and BF16 (needs a CUDA GPU).

    python benchmarks/bench_w4linear.py                 # -> benchmarks/results/w4_linear.csv
    python benchmarks/bench_w4linear.py --bits 8        # -> benchmarks/results/w8_linear.csv
    python benchmarks/bench_w4linear.py --shapes 4096x2048,2048x6144 --ms 1,16 --impls bf16,ours,floor

Case ``4096x2048_m16``: out x in, 16 rows of x. BF16 activations, symmetric codes, one BF16 scale for 128 inputs
(``--group``; another number is said in the case's name). Metric ``us``: one product.

    bf16             torch.nn.functional.linear on the BF16 weight, bf16(q * s)
    tinygemm         torch._convert_weight_to_int4pack (8 inner tiles) and torch._weight_int4pack_mm; 4 bits only
    humming          humming-kernels 0.1.19: HummingLayer(weight_config={dtype: uint4 or uint8, group_size,
                     scale_dtype: bfloat16}, torch_dtype=bfloat16), load_from_tensors, transform, layer(x); its
                     heuristics choose the kernel
    gemlite          gemlite 0.6.0.post2: GemLiteLinear(input_dtype=output_dtype=DType.BF16).pack, layer(x); its default
                     ("fast") autotuning on the first call. It supports BF16, with FP32 sums inside a block and BF16
                     atomics between the parts of a split K on Hopper. 4 bits: codes + 8 and the integer zero point 8;
                     8 bits: int8 codes and none. So it reads no tensor of zero points
    ours             kernels/low_bit_linear.py: packed integers only
    ours_bf16copy    the same with the BF16 weight kept beside them
    floor            time to move the weight's bytes, codes and BF16 scales: an elementwise kernel that reads half as
                     many bytes and writes the other half. x, y and the number of rows do not enter

All have the same codes: a normal weight rounded to nearest, minmax scales. Such codes are never -8 (-128), and humming
then stores sign and magnitude; a grid that has a -8 stays offset binary there and gets another kernel.

Every implementation has its own packed copies of the weight, more than 160 MB in all and at least eight, so that none
is found in the L2. A CUDA graph runs each copy once, one after the other: kernels of ours start early there
(docs/kernels.md) and may be faster than the floor's, which do not. The graphs are replayed in turns (record.py), and
``us`` is the time of a replay over the number of copies. Before that one product is compared with FP64, and a wrong one
ends the program. A peer that is not installed, or fails at a shape or a number of rows, is said on standard error and
has no row.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from bench_loss import Parser, numbers_in, release, say
from record import Call, Row, place_of, results_file, row_of, time_interleaved, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.quant.affine import bake, dequantize, quantize_tensor
from grace_vlm.quant.packing import pack_rows, to_unsigned
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

SHAPES = "4096x2048,2048x2048,12288x2048,2048x6144,22016x4096"
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
GROUP_SIZE = 128
ROTATED_BYTES, MIN_COPIES = 160_000_000, 8
"""More than three times the 50 MB L2; eight copies, so that the start of a graph is little of a replay."""
CHECKED_ROWS, TOLERANCE = 16, 2e-2
WARMUP = 3
INNER_K_TILES = 8
"""tinygemm's widest tile, what torchao and gpt-fast use."""

Linear = Callable[[torch.Tensor], torch.Tensor]
"""x (M, in) BF16 -> y (M, out) BF16, from a packed weight of its own."""
Result = TypeVar("Result")


class Shape(NamedTuple):
    """Of a weight."""

    out_features: int
    in_features: int

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"

    def case(self, num_rows: int, group_size: int = GROUP_SIZE) -> str:
        return f"{self}_m{num_rows}" + (f"_g{group_size}" if group_size != GROUP_SIZE else "")


def weight_bytes(shape: Shape, scheme: QuantScheme) -> int:
    """Codes and BF16 scales, without padding."""
    num_weights = shape.out_features * shape.in_features
    return num_weights * scheme.num_bits // 8 + 2 * num_weights // scheme.group_size


def num_copies(impl: str, shape: Shape, scheme: QuantScheme) -> int:
    """So many that what a product reads of each of them does not fit in the L2 together."""
    read = 2 * shape.out_features * shape.in_features if impl == "bf16" else weight_bytes(shape, scheme)
    return max(MIN_COPIES, math.ceil(ROTATED_BYTES / read))


def random_weight(shape: Shape, scheme: QuantScheme, device: torch.device) -> QuantizedTensor:
    """A normal weight on its grid, the same every time; y then has about the variance of x."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(*shape, device=device, generator=generator) / math.sqrt(shape.in_features)
    return quantize_tensor(weight, minmax_scale(weight, scheme), scheme)


def own(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same numbers in other memory: a packer may keep what it is given (gemlite does with int8 codes)."""
    return QuantizedTensor(tensor.codes.clone(), tensor.scale.clone(), tensor.scheme)


def bf16(tensor: QuantizedTensor) -> Linear:
    weight = bake(tensor)
    return lambda x: torch.nn.functional.linear(x, weight)


def tinygemm_tensors(tensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (out, in / 2) of codes + 8, the even column in the high half; BF16 (in / group, out, 2) of scale and zero.

    The operator's weight is (u - 8) * scale + zero, so a symmetric one has zeros of 0.
    """
    unsigned = to_unsigned(tensor.codes, 4)
    scale = tensor.scale.to(torch.bfloat16)
    scales_and_zeros = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
    return unsigned[:, 0::2] << 4 | unsigned[:, 1::2], scales_and_zeros


def tinygemm(tensor: QuantizedTensor) -> Linear:
    nibbles, scales_and_zeros = tinygemm_tensors(tensor)
    packed = torch._convert_weight_to_int4pack(nibbles, INNER_K_TILES)
    group_size = tensor.scheme.group_size
    return lambda x: torch._weight_int4pack_mm(x, packed, group_size, scales_and_zeros)


def humming_tensors(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """int32 (out, in * bits / 32) of offset binary codes, lowest bits first, and BF16 (out, in / group)."""
    return {
        "weight": pack_rows(tensor.codes, tensor.scheme.num_bits),
        "weight_scale": tensor.scale.to(torch.bfloat16),
    }


def humming(tensor: QuantizedTensor) -> Linear:
    from humming.layer import HummingLayer

    scheme = tensor.scheme
    config = {"dtype": f"uint{scheme.num_bits}", "group_size": scheme.group_size, "scale_dtype": "bfloat16"}
    out_features, in_features = tensor.shape
    layer = HummingLayer(
        shape_n=out_features, shape_k=in_features, weight_config=config, torch_dtype=torch.bfloat16
    ).to(tensor.codes.device)
    layer.load_from_tensors(humming_tensors(tensor))
    layer.transform()
    linear: Linear = layer
    return linear


def gemlite_tensors(tensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """(codes, scale, zero point) of GemLiteLinear.pack, whose weight is (codes - zero point) * scale."""
    scale = tensor.scale.to(torch.bfloat16)
    if tensor.scheme.num_bits == 8:
        return tensor.codes, scale, None
    return to_unsigned(tensor.codes, tensor.scheme.num_bits), scale, 1 << (tensor.scheme.num_bits - 1)


def gemlite(tensor: QuantizedTensor) -> Linear:
    from gemlite import DType, GemLiteLinear

    out_features, in_features = tensor.shape
    layer = GemLiteLinear(
        tensor.scheme.num_bits,
        group_size=tensor.scheme.group_size,
        in_features=in_features,
        out_features=out_features,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(*gemlite_tensors(tensor))
    linear: Linear = layer
    return linear


def ours(tensor: QuantizedTensor) -> Linear:
    from grace_vlm.kernels.low_bit_linear import low_bit_linear, pack_linear

    packed = pack_linear(tensor, tensor.codes.device)
    return lambda x: low_bit_linear(x, packed)


def ours_bf16copy(tensor: QuantizedTensor) -> Linear:
    from grace_vlm.kernels.low_bit_linear import low_bit_linear, pack_linear

    packed = pack_linear(tensor, tensor.codes.device, keep_bf16=True)
    return lambda x: low_bit_linear(x, packed)


def floor(tensor: QuantizedTensor) -> Linear:
    # A kernel and no copy_: in a graph that would be a memcpy node, with other gaps around it than a kernel's.
    num_words = weight_bytes(Shape(*tensor.shape), tensor.scheme) // 2 // 4
    source = torch.zeros(num_words, dtype=torch.int32, device=tensor.codes.device)
    target = torch.empty_like(source)
    return lambda x: torch.bitwise_not(source, out=target)


IMPLS: dict[str, Callable[[QuantizedTensor], Linear]] = {
    "bf16": bf16,
    "tinygemm": tinygemm,
    "humming": humming,
    "gemlite": gemlite,
    "ours": ours,
    "ours_bf16copy": ours_bf16copy,
    "floor": floor,
}
PEERS = ("tinygemm", "humming", "gemlite")
"""Other people's programs: one that fails is said and has no row, and the others go on."""
PACKAGES = ("humming", "gemlite")
"""Peers that torch does not bring; imported under the same name."""
BITS = {"tinygemm": (4,)}
"""Where an implementation does not do both 4 and 8."""


def present(names: Sequence[str], num_bits: int) -> list[str]:
    """Those of ``names`` that are installed and have weights of so many bits."""
    kept = []
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            say(f"{name}: it is not installed, so it has no rows")
        elif num_bits not in BITS.get(name, (4, 8)):
            say(f"{name}: it has no {num_bits}-bit weights, so it has no rows")
        else:
            kept.append(name)
    return kept


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def tried(name: str, where: str, call: Callable[[], Result]) -> Result | None:
    """What ``call`` returns; None, and a line on standard error, if it is a peer's and fails."""
    try:
        return call()
    # Peers refuse in many ways: assertions, plain Exception, a compiler's own classes.
    except Exception as error:
        if name not in PEERS:
            raise
        say(f"{where}: {name} is skipped: {first_line(error)}")
        return None


def make_copies(name: str, tensor: QuantizedTensor) -> list[Linear]:
    count = num_copies(name, Shape(*tensor.shape), tensor.scheme)
    return [IMPLS[name](own(tensor)) for _ in range(count)]


def check(name: str, case: str, output: torch.Tensor, x: torch.Tensor, exact: torch.Tensor) -> None:
    """``ValueError`` unless |y - x W^T| < 0.02 |x W^T| over at most 16 rows, evenly spread, in FP64.

    Args:
        output: (M, out); ``x``: (M, in); ``exact``: (out, in) FP64, q * s.
    """
    if output.shape != (len(x), len(exact)):
        raise ValueError(f"{case}: {name} is wrong: shape {tuple(output.shape)}, not {(len(x), len(exact))}")
    rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS), device=x.device).round().long()
    expected = x[rows].double() @ exact.T
    error = float((output[rows].double() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise ValueError(f"{case}: {name} is wrong: relative error {error:.3g}, allowed {TOLERANCE}")


def replayed(who: str, copies: Sequence[Linear], x: torch.Tensor) -> Call:
    """A call that runs every copy once: a graph's replay, or the copies themselves where none can be captured."""

    def run_all() -> None:
        for linear in copies:
            linear(x)

    if not x.is_cuda:
        return run_all
    # Modules are loaded and libraries take their workspaces on a first call: not while a stream is captured.
    run_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run_all()
    except RuntimeError as error:
        say(f"{who} cannot be captured in a CUDA graph and is timed eagerly: {first_line(error)}")
        torch.cuda.synchronize()
        return run_all
    return graph.replay


def measure(
    case: str, num_rows: int, copies: Mapping[str, Sequence[Linear]], exact: torch.Tensor, replays: int
) -> dict[str, list[float]]:
    """Microseconds of one product, by implementation; those that cannot do it are left out."""
    device = exact.device
    generator = torch.Generator(device).manual_seed(num_rows)
    x = torch.randn(num_rows, exact.shape[1], device=device, generator=generator).bfloat16()
    runs: dict[str, Call] = {}
    for name, linears in copies.items():
        output = tried(name, case, partial(linears[0], x))
        if output is None:
            continue
        if name != "floor":
            check(name, case, output, x, exact)
        run = tried(name, case, partial(replayed, f"{case}: {name}", linears, x))
        if run is not None:
            runs[name] = run
    samples = time_interleaved(runs, device, replays, WARMUP)
    return {name: [1000 * ms / len(copies[name]) for ms in values] for name, values in samples.items()}


def measure_shape(args: argparse.Namespace, shape: Shape, place: Row) -> None:
    """All numbers of rows at one shape; the rows of the CSV are written after each."""
    bench = f"w{args.bits}_linear"
    tensor = random_weight(shape, QuantScheme(args.bits, args.group), args.device)
    exact = dequantize(tensor.codes, tensor.scale.double(), torch.float64)
    tries = {name: tried(name, str(shape), partial(make_copies, name, tensor)) for name in args.impls}
    copies = {name: made for name, made in tries.items() if made is not None}
    for num_rows in args.ms:
        case = shape.case(num_rows, args.group)
        samples = measure(case, num_rows, copies, exact, args.replays)
        rows = [row_of(bench, case, name, "us", values, "us", place) for name, values in samples.items()]
        write_rows(args.out, rows)
        medians = [f"{row['impl']} {float(row['p50']):.2f}" for row in rows]
        print(f"{case}: {', '.join(medians)} us", flush=True)
        release(args.device)


def parser() -> Parser:
    made = Parser(prog="bench_w4linear.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of a code; default: %(default)s")
    made.add_argument("--group", type=int, default=GROUP_SIZE, help="inputs that share a scale; default: %(default)s")
    made.add_argument("--shapes", default=SHAPES, help="OUTxIN with commas; default: %(default)s")
    made.add_argument("--ms", help=f"numbers of rows; default: {','.join(map(str, MS))}")
    made.add_argument("--impls", default=",".join(IMPLS), help="default: %(default)s")
    made.add_argument("--replays", type=int, default=25, help="timed ones of each graph; default: %(default)s")
    made.add_argument("--out", type=Path, help="CSV whose rows are replaced; default: w4_linear.csv, see the head")
    made.add_argument("--device", default="cuda", help="cuda, or cpu to see that it runs; default: %(default)s")
    return made


def shapes_in(made: Parser, text: str) -> list[Shape]:
    """``--shapes``; what is none ends the program."""
    found = [re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", word) for word in text.split(",")]
    shapes = [Shape(int(match[1]), int(match[2])) for match in found if match]
    if len(shapes) != len(found):
        made.error("--shapes has a word that is no OUTxIN, for example 4096x2048")
    return shapes


def names_in(made: Parser, text: str, known: Collection[str]) -> list[str]:
    """``--impls``; a name that is not ``known`` ends the program."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        made.error(f"--impls {unknown[0]!r} is no implementation; there are {', '.join(known)}")
    return names


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments; ``shapes`` are ``Shape``, ``ms`` integers, ``impls`` those that can run."""
    made = parser()
    args = made.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        made.error(f"--device {args.device}: no GPU is usable here")
    args.device = torch.device(args.device)
    if args.group < 1 or args.replays < 1:
        made.error("--group and --replays must be at least 1")
    args.ms = numbers_in(made, "--ms", args.ms, MS, "")
    args.shapes = shapes_in(made, args.shapes)
    args.impls = names_in(made, args.impls, IMPLS)
    args.out = args.out or results_file(f"w{args.bits}_linear", args.device)
    try:
        for shape in args.shapes:
            QuantScheme(args.bits, args.group).check(shape.out_features, shape.in_features, str(shape))
    except (ConfigError, OSError, ValueError) as error:
        made.error(str(error))
    made.require_rows(args.out)
    args.impls = present(args.impls, args.bits)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = settings(argv)
    place = place_of(args.device)
    for shape in args.shapes:
        measure_shape(args, shape, place)
        release(args.device)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
