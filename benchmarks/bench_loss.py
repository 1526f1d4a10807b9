"""Cross-entropy and gated distillation from hidden states: time and memory of ours, the official code's and Liger's.

    python benchmarks/bench_loss.py                     # n1024 n2048 n4096 n8192 -> benchmarks/results/loss.csv
    python benchmarks/bench_loss.py --scaling           # 1k to 64k tokens, three vocabularies -> loss_scaling.csv
    python benchmarks/bench_loss.py --device cpu --cases n8 --vocabulary 50 --student-width 8 --teacher-width 16

A case is N supervised tokens; both vocabulary heads are part of it (Qwen3-VL: V = 151,936, student 2,048 wide, teacher
4,096), BF16 on a GPU and FP32 on a CPU. Every call makes the loss and the gradients of the student's hidden states and
of its head, from nothing but the inputs:

    official         official_loss.py: whole logits, chunks under plain autograd
    liger            liger_kernel's LigerFusedLinearJSDLoss, compiled, chunks of 1,024: another loss (cross-entropy and
                     Jensen-Shannon, no gate, no target taken out), the nearest that others have
    ours             losses/linear_gdkd.py, the head's gradient added to an FP32 sum, as the trainer calls it
    ours_autograd    the same, the head's gradient in BF16 through autograd

    ms               the whole, the pass for the gate and the zeroing of the FP32 sum included
    ms_gate_given    ours with the gate known (a teacher-first pass or a cache has it)
    extra_gb         peak memory beyond the inputs, gradients and FP32 sum included, 1 GB = 1e9 bytes; GPU only

Implementations run in turns in one process (record.py). One that is not installed, or does not fit in memory, is said
on standard error and has no row. Imports PyTorch and ``grace_vlm.losses`` only.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from official_loss import official_step
from record import Call, Row, extra_gigabytes, place_of, read_rows, results_file, row_of, time_interleaved, write_rows

VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH = 151_936, 2048, 4096
TOKENS = (1024, 2048, 4096, 8192)
SCALING_TOKENS = tuple(1024 << k for k in range(7))
SCALING_VOCABULARIES = (32_768, VOCABULARY, 262_144)
LOGIT_STD = 2.0
MEMORY_SAMPLES, WARMUP = 3, 3
UNITS = {"ms": "ms", "ms_gate_given": "ms", "extra_gb": "GB"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a case."""

    num_tokens: int
    vocabulary: int = VOCABULARY
    student_width: int = STUDENT_WIDTH
    teacher_width: int = TEACHER_WIDTH

    def name(self, scaling: bool = False) -> str:
        """``n1024``; with the vocabulary, and the widths, where they are not Qwen3-VL's or ``scaling`` varies them."""
        name = f"n{self.num_tokens}"
        if scaling or self.vocabulary != VOCABULARY:
            name += f"_v{self.vocabulary}"
        if (self.student_width, self.teacher_width) != (STUDENT_WIDTH, TEACHER_WIDTH):
            name += f"_d{self.student_width}x{self.teacher_width}"
        return name


@dataclass(frozen=True)
class Inputs:
    """student_hidden (N, d_s), student_head (V, d_s), teacher_hidden (N, d_t), teacher_head (V, d_t), targets (N,)."""

    student_hidden: torch.Tensor
    student_head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    targets: torch.Tensor


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Random inputs, the same every time: both models' logits have a standard deviation of 2 and a correlation of 0.7.

    The teacher's leading columns are the student's, states and head; the others are its own.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, device=device, dtype=dtype, generator=generator)

    num_tokens, common = shape.num_tokens, min(shape.student_width, shape.teacher_width)
    student_hidden, student_head = (normal(rows, shape.student_width) for rows in (num_tokens, shape.vocabulary))
    teacher_hidden, teacher_head = (normal(rows, shape.teacher_width) for rows in (num_tokens, shape.vocabulary))
    teacher_hidden[:, :common], teacher_head[:, :common] = student_hidden[:, :common], student_head[:, :common]
    student_head *= LOGIT_STD / shape.student_width**0.5
    teacher_head *= LOGIT_STD / shape.teacher_width**0.5
    targets = torch.randint(shape.vocabulary, (num_tokens,), device=device, generator=generator)
    return Inputs(student_hidden, student_head, teacher_hidden, teacher_head, targets)


Calls = dict[str, Call]
"""Metric -> what is timed for it; ``ms`` is there always. A call returns (loss, gradient of states, of head)."""


def official_calls(inputs: Inputs) -> Calls:
    given = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
    return {"ms": lambda: official_step(*given, inputs.targets)}


def liger_calls(inputs: Inputs) -> Calls:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compiled = inputs.targets.is_cuda
    if compiled:
        from torch import _dynamo

        # Each case is compiled for its own shape: after a few shapes Dynamo would give up and run it uncompiled.
        _dynamo.reset()
    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, compiled=compiled, chunk_size=1024
    )

    def step() -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        hidden, head = _leaf(inputs.student_hidden), _leaf(inputs.student_head)
        loss = loss_of(hidden, head, inputs.teacher_hidden, inputs.teacher_head, inputs.targets)
        loss.backward()
        return loss.detach(), hidden.grad, head.grad

    return {"ms": step}


def ours_calls(inputs: Inputs, accumulate: bool = True) -> Calls:
    from grace_vlm.losses.linear_gdkd import linear_gate, linear_gdkd

    num_tokens, head_shape = inputs.targets.shape[0], inputs.student_head.shape

    def step(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        hidden, head = _leaf(inputs.student_hidden), _leaf(inputs.student_head)
        total = torch.zeros(head_shape, dtype=torch.float32, device=head.device) if accumulate else None
        terms = linear_gdkd(
            hidden,
            head,
            inputs.targets,
            cross_entropy_weights=1.0 / num_tokens,
            teacher_hidden=inputs.teacher_hidden,
            teacher_head=inputs.teacher_head,
            distillation_weights=gate / gate.sum(),
            temperature=2.0,
            tckd_weight=1.0,
            nckd_weight=4.0,
            head_gradient=total,
        )
        terms.loss.backward()
        return terms.loss.detach(), hidden.grad, head.grad if total is None else total

    def gate() -> torch.Tensor:
        return linear_gate(inputs.teacher_hidden, inputs.teacher_head)

    known = gate()
    return {"ms": lambda: step(gate()), "ms_gate_given": lambda: step(known)}


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, with a gradient of their own."""
    return tensor.detach().requires_grad_()


IMPLS: dict[str, Callable[[Inputs], Calls]] = {
    "official": official_calls,
    "liger": liger_calls,
    "ours": ours_calls,
    "ours_autograd": lambda inputs: ours_calls(inputs, accumulate=False),
}
SCALING_IMPLS = ("official", "liger", "ours")
MODULES = {
    "liger": "liger_kernel",
    "ours": "grace_vlm.losses.linear_gdkd",
    "ours_autograd": "grace_vlm.losses.linear_gdkd",
}
"""What an implementation needs beyond PyTorch."""
PEERS = ("liger",)
"""Other people's programs: one that fails is said and has no rows, and the others go on."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def release(device: torch.device) -> None:
    """Give cached memory back, so that each implementation finds the same."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Prepared:
    """An implementation that ran once at this shape: what to time, its loss, its memory in GB (none on a CPU)."""

    calls: Calls
    loss: float
    gigabytes: list[float]


def prepare(name: str, inputs: Inputs, metrics: Sequence[str]) -> Prepared:
    """First calls (compilation, libraries' workspaces), then memory."""
    device = inputs.targets.device
    calls = {metric: call for metric, call in IMPLS[name](inputs).items() if metric in metrics}
    for call in calls.values():
        call()
    result = calls["ms"]()
    assert isinstance(result, tuple)
    loss = float(result[0])
    del result
    release(device)
    on_gpu = device.type == "cuda" and "extra_gb" in metrics
    gigabytes = [extra_gigabytes(calls["ms"], device) for _ in range(MEMORY_SAMPLES)] if on_gpu else []
    return Prepared(calls, loss, gigabytes)


def prepare_all(
    names: Sequence[str], inputs: Inputs, metrics: Sequence[str], case: str, required: Sequence[str]
) -> dict[str, Prepared]:
    """Those of ``names`` that run at this shape."""
    ready = {}
    for name in names:
        try:
            ready[name] = prepare(name, inputs, metrics)
        except torch.OutOfMemoryError:
            say(f"{case}: {name} does not fit in memory")
        except (ImportError, RuntimeError) as error:
            if name not in PEERS or name in required:
                raise
            say(f"{case}: {name} failed: {next(iter(str(error).splitlines()), type(error).__name__)}")
        release(inputs.targets.device)
    return ready


def timed(calls: Mapping[str, Call], device: torch.device, iterations: int, case: str) -> dict[str, list[float]]:
    """Samples taken in turns; each alone where the cached memory of all does not fit side by side."""
    if device.type != "cuda":
        return time_interleaved(calls, device, iterations)

    def num_retries() -> int:
        return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))

    try:
        time_interleaved(calls, device, 0, WARMUP)
        before = num_retries()
        samples = time_interleaved(calls, device, iterations, 0)
        if num_retries() == before:
            return samples
    except torch.OutOfMemoryError:
        pass
    say(f"{case}: the implementations do not fit in memory side by side: timed one after the other")
    alone: dict[str, list[float]] = {}
    for name, call in calls.items():
        release(device)
        alone |= time_interleaved({name: call}, device, iterations, WARMUP)
    return alone


def measure(args: argparse.Namespace, shape: Shape, place: Row) -> list[Row]:
    """Rows of one case."""
    case, bench = shape.name(args.scaling), "loss_scaling" if args.scaling else "loss"
    metrics = ("ms", "extra_gb") if args.scaling else tuple(UNITS)
    try:
        inputs = make_inputs(shape, args.device)
    except torch.OutOfMemoryError:
        say(f"{case}: the inputs do not fit in memory")
        return []
    ready = prepare_all(args.impls, inputs, metrics, case, args.require)
    keys = [(name, metric) for name, found in ready.items() for metric in found.calls]
    samples = timed({" ".join(k): ready[k[0]].calls[k[1]] for k in keys}, args.device, args.iterations, case)
    rows, said = [], []
    for name, found in ready.items():
        values = {metric: samples[f"{name} {metric}"] for metric in found.calls}
        if found.gigabytes:
            values["extra_gb"] = found.gigabytes
        rows += [row_of(bench, case, name, metric, value, UNITS[metric], place) for metric, value in values.items()]
        numbers = [f"{row['p50']} {metric}" for metric, row in zip(values, rows[-len(values) :], strict=True)]
        said.append(f"{name} {', '.join(numbers)}, loss {found.loss:.4f}")
    say(f"{case}: {'; '.join(said) or 'nothing ran'}")
    return rows


class Parser(argparse.ArgumentParser):
    """One plain line for a user's error."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def require_rows(self, path: Path) -> None:
        """An error if there is a file whose rows cannot be replaced: said before anything is measured."""
        try:
            if path.exists():
                read_rows(path)
        except (OSError, ValueError) as error:
            self.error(str(error))


def parser() -> Parser:
    made = Parser(prog="bench_loss.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = "CSV whose rows are replaced; default: benchmarks/results/loss.csv (on an H100; else loss_<gpu>.csv)"
    made.add_argument("--out", type=Path, help=f"{out}, with --scaling loss_scaling.csv")
    made.add_argument("--cases", help="numbers of tokens, n1024,n8192; default: all")
    made.add_argument("--impls", help=f"of {','.join(IMPLS)}; default: all, with --scaling {','.join(SCALING_IMPLS)}")
    made.add_argument("--require", default="", help="implementations that must be there, for example liger")
    made.add_argument("--iterations", type=int, default=20, help="calls of each; default: %(default)s")
    made.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    made.add_argument("--scaling", action="store_true", help="1k to 64k tokens at three vocabularies")
    made.add_argument("--vocabulary", help="words of both heads, one number or several with commas")
    made.add_argument("--student-width", type=int, default=STUDENT_WIDTH, help="default: %(default)s")
    made.add_argument("--teacher-width", type=int, default=TEACHER_WIDTH, help="default: %(default)s")
    return made


def names_in(made: Parser, option: str, text: str | None, default: Sequence[str]) -> list[str]:
    names = list(default) if text is None else [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in IMPLS]
    if unknown:
        made.error(f"{option} {unknown[0]} is no implementation; there are {', '.join(IMPLS)}")
    return names


def numbers_in(made: Parser, option: str, text: str | None, default: Sequence[int], prefix: str) -> list[int]:
    """Positive numbers of a comma-separated list, each behind ``prefix``."""
    if text is None:
        return list(default)
    words = text.split(",")
    wrong = [word for word in words if not re.fullmatch(prefix + "0*[1-9][0-9]*", word)]
    if wrong:
        made.error(f"{option} has {wrong[0]!r}; expected {prefix}NUMBER, for example {prefix}{default[0]}")
    return [int(word.removeprefix(prefix)) for word in words]


def settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Shape]]:
    """Checked arguments and the cases, smallest first."""
    made = parser()
    args = made.parse_args(argv)
    if args.iterations < 1:
        made.error(f"--iterations is {args.iterations}; expected at least 1")
    if min(args.student_width, args.teacher_width) < 1:
        made.error("--student-width and --teacher-width must be at least 1")
    if args.device not in (None, "cpu") and not torch.cuda.is_available():
        made.error(f"--device {args.device} was asked for and no GPU is usable; use --device cpu")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.require = names_in(made, "--require", args.require, ())
    args.impls = names_in(made, "--impls", args.impls, SCALING_IMPLS if args.scaling else tuple(IMPLS))
    args.impls += [name for name in args.require if name not in args.impls]
    tokens = numbers_in(made, "--cases", args.cases, SCALING_TOKENS if args.scaling else TOKENS, "n")
    usual = (VOCABULARY,) if not args.scaling else SCALING_VOCABULARIES
    words = numbers_in(made, "--vocabulary", args.vocabulary, usual, "")
    shapes = [Shape(n, v, args.student_width, args.teacher_width) for n in tokens for v in words]
    args.out = args.out or results_file("loss_scaling" if args.scaling else "loss", args.device)
    try:
        read_rows(args.out)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        made.error(str(error))
    keep_those_there(made, args)
    return args, sorted(shapes, key=lambda shape: (shape.num_tokens * shape.vocabulary, shape.num_tokens))


def keep_those_there(made: Parser, args: argparse.Namespace) -> None:
    """Drop implementations that cannot be imported; a required one is an error."""
    for name in list(args.impls):
        module = MODULES.get(name)
        if module is None or importlib.util.find_spec(module) is not None:
            continue
        if name in args.require:
            made.error(f"--require {name}: {module} is not installed")
        say(f"{name}: {module} is not installed, so it has no rows")
        args.impls.remove(name)
    if not args.impls:
        made.error("none of the implementations asked for is installed")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases; rows are written after each."""
    args, shapes = settings(argv)
    place = place_of(args.device)
    for shape in shapes:
        rows = measure(args, shape, place)
        if rows:
            write_rows(args.out, rows)
        release(args.device)
    say(f"wrote {args.out}" if args.out.exists() else "no rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
