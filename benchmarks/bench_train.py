"""Whole training steps of Qwen3-VL-2B under Qwen3-VL-8B, beside the official algorithm (needs a GPU).

    python benchmarks/bench_train.py                                   # -> benchmarks/results/train_step.csv
    python benchmarks/bench_train.py --cases grace_8x512_online sft_8x512 --steps 12

A step is whole: rows from the loader that no step has seen, towers, teacher, forward, backward, clip, optimizer, grid
weights, reads of the cache. Rows are 512 tokens: one 448 x 448 picture (196 visual tokens), 52 % supervised. Random
weights at true sizes. ``ms`` is of one micro-batch: ``2x512`` is an optimizer step of 16 of them, divided by 16.

    official   the reference's algorithm, restated (official_step.py): fake-quantization in every forward, whole logits,
               BF16 weights and moments, padded rows, teacher micro-batch by micro-batch
    ours       this repository's loop: FP32 masters and moments (or 8-bit moments where the case says ``adam8``)

Cases without ``official``: FP8 teacher, the teacher's signal from the disk cache, packed rows of real lengths (lengths
drawn like captions and short questions, pictures of many sizes), packs of 8,192 tokens without recomputation.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_true_size import PUBLISHED, WORDS, published_recipe, write_rows
from official_step import Mode, OfficialStep
from PIL import Image
from record import GB, Row, gpu, place_of, results_file, row_of
from record import write_rows as write_csv

from grace_vlm.cli.dry_run import Described
from grace_vlm.data.ledger import Ledger
from grace_vlm.train.cache_build import build_cache
from grace_vlm.train.config import Recipe
from grace_vlm.train.estimate import GIB
from grace_vlm.train.fit import fit, gpu_bytes
from grace_vlm.train.heap import quiet_heap
from grace_vlm.train.loop import Run
from grace_vlm.train.open import open_loader, open_rows, open_student, open_teacher
from grace_vlm.train.ranks import Ranks
from grace_vlm.train.step import PendingStep

QWEN = (*PUBLISHED, "qwen3_vl_2b_grace_w4g128")
LLAVA = ("random:llava-hf/llava-1.5-7b-hf", "random:llava-hf/llava-1.5-13b-hf", "llava_1_5_7b_grace_w4g128")
"""Student, teacher, recipe."""
EIGHT = ("data.micro_batch_size=8", "data.accumulation=1")
TWO = ("data.micro_batch_size=2", "data.accumulation=16", "runtime.gradient_checkpointing=false")
SMALL = ("optim.moments=8bit", "runtime.loss_workspace_mib=128")
PACKS = ("data.micro_batch_size=256", "data.accumulation=1", "data.max_batch_tokens=8192", "data.max_tokens=8192")


@dataclass(frozen=True)
class Case:
    """A set-up of our loop.

    Args:
        rows: ``equal`` (512 tokens each) or ``real``. cached: the teacher is a folder of its signals.
        fit: a size of a GPU for which ``--fit`` changes the set-up, and to which the memory is then limited.
    """

    overrides: tuple[str, ...]
    rows: str = "equal"
    cached: bool = False
    fit: str | None = None
    models: tuple[str, str, str] = QWEN


CASES = {
    "grace_8x512_online": Case(EIGHT),
    "grace_8x512_fp8_adam8": Case((*EIGHT, *SMALL, "model.teacher_precision=fp8")),
    "grace_8x512_cached": Case((*EIGHT, "runtime.gradient_checkpointing=false"), cached=True),
    "grace_8x512_cached_adam8": Case((*EIGHT, *SMALL), cached=True),
    "grace_2x512_online": Case(TWO),
    "sft_8x512": Case((*EIGHT, "method=sft", "scheme=bf16")),
    "grace_packed_real": Case((*PACKS, "data.max_batch_tokens=4096", "data.max_tokens=4096"), rows="real"),
    "grace_packed_8192_kept": Case((*PACKS, "runtime.gradient_checkpointing=false")),
    "grace_fit_24gb_cached": Case(("data.micro_batch_size=8", "data.accumulation=1"), cached=True, fit="24GB"),
    "grace_8x512_teacher_gpu": Case((*EIGHT, "model.teacher_device=cuda:1")),
    "llava_7b_from_13b_cached_adam8": Case(
        (*EIGHT, "optim.moments=8bit", "runtime.gradient_checkpointing=false"), cached=True, models=LLAVA
    ),
    "llava_7b_from_13b_cached": Case(EIGHT, cached=True, models=LLAVA),
    "llava_7b_from_13b_online_adam8": Case((*EIGHT, "optim.moments=8bit"), models=LLAVA),
}
UNUSUAL = tuple(name for name in CASES if name.startswith("llava") or name.endswith("teacher_gpu"))
"""Cases that are left out unless they are named: 80 GB do not hold those of LLaVA, and the other takes two GPUs."""
OFFICIAL: dict[str, tuple[Mode, int]] = {
    "sft_8x512": ("sft", 8),
    "qat_8x512": ("qat", 8),
    "grace_8x512_online": ("grace", 8),
    "grace_2x512_online": ("grace", 2),
}
"""Case -> (mode of ``official_step.OfficialStep``, rows of a micro-batch)."""


def write_real_rows(folder: Path, num_rows: int) -> Path:
    """Rows of many lengths: captions, and a third short questions; pictures of 196 to 448 pixels a side."""
    rng, pixels = random.Random(1), np.random.default_rng(1)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_rows):
        small = pixels.integers(0, 255, (14, 14, 3), dtype=np.uint8)
        size = (rng.randrange(196, 449, 28), rng.randrange(196, 449, 28))
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg")
        is_caption = rng.random() < 2 / 3
        asked = " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))
        answer = " ".join(rng.choices(WORDS, k=int(rng.lognormvariate(5.2, 0.5)) if is_caption else rng.randint(1, 12)))
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"id": str(number), "image": f"images/{number}.jpg", "conversations": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_of(rows: Path, overrides: tuple[str, ...], models: tuple[str, str, str] = QWEN) -> Recipe:
    student, teacher, name = models
    settings = ("data.workers=8", "optim.num_steps=10000", "runtime.compile=true", *overrides)
    return published_recipe(name, student, teacher, rows, settings)


@dataclass(frozen=True)
class Measured:
    """Milliseconds of each step, its tokens, and the peak of what PyTorch allocated; ``teacher_peak_gib``: on the GPU
    that only the teacher is on; ``sent_gb``: out of this process a step."""

    milliseconds: list[float]
    tokens: list[int]
    peak_gib: float
    teacher_peak_gib: float | None = None
    sent_gb: float = 0.0

    def rows(self, case: str, impl: str, micro_batches: int, place: Row) -> list[Row]:
        each = [ms / micro_batches for ms in self.milliseconds]
        speed = [tokens * 1000 / ms for tokens, ms in zip(self.tokens, self.milliseconds, strict=True)]
        values = {"ms": (each, "ms"), "tokens_per_second": (speed, "1/s"), "peak_gib": ([self.peak_gib], "GiB")}
        if self.teacher_peak_gib is not None:
            values["teacher_peak_gib"] = ([self.teacher_peak_gib], "GiB")
        return [row_of("train_step", case, impl, name, *value, place) for name, value in values.items()]


@contextlib.contextmanager
def clean_gpu(size: str | None = None) -> Iterator[None]:
    """What came before is gone before, and what was made here after; ``size``: a smaller card, to PyTorch."""
    if size is not None:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_bytes(size) / whole))
    gc.collect()
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch._dynamo.reset()
    torch.cuda.set_per_process_memory_fraction(1.0)


def measure_ours(recipe: Recipe, out: Path, num_steps: int, warmup: int = 5, ranks: Ranks | None = None) -> Measured:
    """The loop of ``Run.steps``: a step is read when the next one has been queued."""
    run = Run(recipe, out, ranks=ranks)
    gpus = [run.stepper.device]
    if recipe.has_teacher_elsewhere:
        gpus.append(torch.device(recipe.teacher_device))
    milliseconds, tokens = [], []
    pending: PendingStep | None = None
    read_at, sent = 0.0, 0
    with quiet_heap() as step_queued, contextlib.closing(run.loader):
        for step in range(num_steps + warmup + 1):
            batches = [run.loader.next() for _ in range(run.num_micro_batches)]
            sent = run.ranks.sent_bytes
            queued = run.stepper.launch(step, batches)
            sent = run.ranks.sent_bytes - sent
            step_queued()
            if pending is not None:
                report = pending.resolve()
                now = time.perf_counter()
                if step == warmup:
                    # A random teacher in FP8 is made in BF16 first; one from a folder never is.
                    for gpu in gpus:
                        if gpu.type == "cuda":
                            torch.cuda.reset_peak_memory_stats(gpu)
                if step > warmup:
                    milliseconds.append(1000 * (now - read_at))
                    tokens.append(report.tokens)
                read_at = now
            pending = queued
        assert pending is not None
        pending.resolve()
    peak_gib = [peak_bytes(gpu) / GIB for gpu in gpus]
    of_teacher = peak_gib[1] if len(gpus) > 1 else None
    return Measured(milliseconds, tokens, peak_gib[0], of_teacher, sent / GB)


def peak_bytes(gpu: torch.device) -> int:
    """The peak of what PyTorch allocated, and all that CUDA graphs hold for themselves: a replay allocates nothing. On
    a CPU of all that the process had."""
    if gpu.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0)]
    here = [segment for segment in own if segment["device"] == gpu.index]
    return torch.cuda.max_memory_allocated(gpu) + sum(s["total_size"] - s["active_size"] for s in here)


def measure_official(mode: Mode, micro_batch_size: int, rows: Path, out: Path, num_steps: int) -> Measured:
    """The official step on the same rows, padded; our loop is opened for its loader and its models."""
    accumulation = 16 if micro_batch_size == 2 else 1
    rows_a_step = (f"data.micro_batch_size={micro_batch_size}", f"data.accumulation={accumulation}")
    recipe = recipe_of(rows, (*rows_a_step, "data.packing=false", "runtime.cuda_graphs=false"))
    file = open_rows(recipe)
    student = open_student(recipe, file)
    teacher = open_teacher(recipe, student) if mode == "grace" else None
    loader = open_loader(recipe, file, student, Ledger(out / "ledger.jsonl"), torch.device("cuda"))
    official = OfficialStep(student.model, None if teacher is None else teacher.model, mode)
    milliseconds, tokens = [], []
    try:
        for step in range(num_steps + 2):
            started = time.perf_counter()
            batches = [loader.next() for _ in range(accumulation)]
            official.run(batches).item()
            if step >= 2:
                milliseconds.append(1000 * (time.perf_counter() - started))
                tokens.append(sum(batch.num_tokens for batch in batches))
    finally:
        loader.close()
    return Measured(milliseconds, tokens, torch.cuda.max_memory_allocated() / GIB)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--cases", nargs="*", default=[n for n in CASES if n not in UNUSUAL], choices=list(CASES), help="of our loop"
    )
    made.add_argument(
        "--official", nargs="*", default=list(OFFICIAL), choices=list(OFFICIAL), help="of the official step"
    )
    made.add_argument("--steps", type=int, default=24, help="timed; a third of them where a step is 16 micro-batches")
    made.add_argument("--no-graphs", action="store_true", help="decoders launch by launch; impl is then ours_launches")
    made.add_argument("--num-rows", type=int, default=384)
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    device = gpu()
    path, place = args.out or results_file("train_step", device), place_of(device)

    def keep(case: str, impl: str, measured: Measured, micro_batches: int) -> None:
        rows = measured.rows(case, impl, micro_batches, place)
        print(case, impl, *(f"{row['metric']} {row['p50']}" for row in rows), flush=True)
        write_csv(path, rows)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = {"equal": write_rows(folder / "equal", args.num_rows, 32, 266)}
        if any(CASES[name].rows == "real" for name in args.cases):
            rows["real"] = write_real_rows(folder / "real", 2 * args.num_rows)
        caches = {models: folder / models[2] for models in {CASES[n].models for n in args.cases if CASES[n].cached}}
        for models, cache in caches.items():
            with clean_gpu():
                build_cache(recipe_of(rows["equal"], EIGHT, models), cache)
        for name in args.official:
            mode, size = OFFICIAL[name]
            count = max(2, args.steps // 8) if size == 2 else args.steps
            with clean_gpu():
                measured = measure_official(mode, size, rows["equal"], folder / f"official_{name}", count)
            keep(name, "official", measured, 16 if size == 2 else 1)
        for name in args.cases:
            case = CASES[name]
            more = [f"model.teacher_cache={caches[case.models]}"] if case.cached else []
            more += ["runtime.cuda_graphs=false"] if args.no_graphs else []
            recipe = recipe_of(rows[case.rows], (*case.overrides, *more), case.models)
            if case.fit is not None:
                recipe, changes = fit(recipe, gpu_bytes(case.fit), Described(recipe, None, None, None).estimate)
                print(case.fit, *changes, sep="\n    ", flush=True)
            count = args.steps // 3 if recipe.data.accumulation > 1 else args.steps
            with clean_gpu(case.fit):
                measured = measure_ours(recipe, folder / name, count)
            keep(name, "ours_launches" if args.no_graphs else "ours", measured, recipe.data.accumulation)


if __name__ == "__main__":
    main()
