"""Steps at the published sizes with random weights: memory against its estimate, and that every family trains.

    python benchmarks/bench_true_size.py families --out benchmarks/results/families.csv
    python benchmarks/bench_true_size.py memory --out benchmarks/results/true_size.csv

``families`` takes 20 GRACE steps of each family at true widths and reduced depth: does the loss fall, do the scales
move, does what is frozen stay bit for bit, does the projector move. ``memory`` takes whole optimizer steps of the
published pair and compares PyTorch's peak with ``grace train --dry-run``'s. Random weights say nothing of quality.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from grace_vlm.train.config import Recipe, load_recipe, recipe_from
from grace_vlm.train.estimate import GIB, Load, estimate
from grace_vlm.train.loop import Run
from grace_vlm.train.open import describe, plan_for

WORDS = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in "nrst"]
FAMILIES = {
    "qwen3_vl": ("random:Qwen/Qwen3-VL-2B-Instruct:4", "random:Qwen/Qwen3-VL-8B-Instruct:4"),
    "qwen2_vl": ("random:Qwen/Qwen2-VL-2B-Instruct:4", "random:Qwen/Qwen2-VL-7B-Instruct:4"),
    "qwen2_5_vl": ("random:Qwen/Qwen2.5-VL-3B-Instruct:4", "random:Qwen/Qwen2.5-VL-7B-Instruct:4"),
    "llava": ("random:llava-hf/llava-1.5-7b-hf:4", "random:llava-hf/llava-1.5-13b-hf:4"),
}
PUBLISHED = ("random:Qwen/Qwen3-VL-2B-Instruct", "random:Qwen/Qwen3-VL-8B-Instruct")


def write_rows(folder: Path, num_rows: int, question_words: int, answer_words: int, side: int = 448) -> Path:
    """Rows with one JPEG each of smooth noise; every word is one token of a tokenizer that has seen them."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_rows):
        small = pixels.integers(0, 255, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg")
        question, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (question_words, answer_words))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"id": str(number), "image": f"images/{number}.jpg", "conversations": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"hardware": name, "torch": torch.__version__, "transformers": transformers.__version__}


def steps_of(run: Run, num_steps: int) -> Iterator[tuple[Any, float, float]]:
    """(report, seconds of the step, seconds waiting for the loader) of each optimizer step."""
    for step in range(num_steps):
        started = time.perf_counter()
        batches = [run.loader.next() for _ in range(run.recipe.data.accumulation)]
        loaded = time.perf_counter()
        report = run.stepper.run(step, batches, count_flips=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield report, time.perf_counter() - started, loaded - started


def family_recipe(rows: Path, student: str, teacher: str, num_steps: int) -> Recipe:
    return recipe_from(
        {
            "method": "grace",
            "scheme": "w4g128",
            "model": {"student": student, "teacher": teacher},
            "data": {"train": str(rows), "micro_batch_size": 2, "accumulation": 2, "packing": True},
            "optim": {
                "num_steps": num_steps,
                "learning_rate": 3e-4,
                "scale_learning_rate": 3e-3,
                "warmup_fraction": 0.1,
            },
            "loss": {"relational_warmup_steps": 5},
            "runtime": {"gradient_checkpointing": True},
        },
        "families",
    )


def bench_family(name: str, pair: tuple[str, str], rows: Path, out: Path, num_steps: int) -> dict[str, Any]:
    run = Run(family_recipe(rows, *pair, num_steps), out)
    model, adapter = run.student.model, run.student.adapter
    before = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    moving = {key: p.detach().clone() for key, p in model.named_parameters() if "merger" in key or "projector" in key}
    reports, seconds = [], 0.0
    for report, took, _ in steps_of(run, num_steps):
        reports.append(report)
        seconds += took
    after = dict(model.named_parameters())
    # beta and the ramp of omega move, so terms are compared, and their sum at the weights of the end.
    first, last = (_means(part) for part in (reports[:5], reports[-5:]))
    # A norm's weight of 1 moves by less than BF16 can show in 20 steps; matrices do not.
    trained = [key for key in moving if not key.startswith(adapter.frozen) and moving[key].ndim == 2]
    return {
        "family": name,
        "student": pair[0],
        "teacher": pair[1],
        "steps": num_steps,
        "linears": len(run.plan.schemes),
        **{f"{term}_first5": f"{value:.4f}" for term, value in first.items()},
        **{f"{term}_last5": f"{value:.4f}" for term, value in last.items()},
        "loss_falls": last["loss"] < first["loss"],
        "scale_drift": f"{float(run.masters.scale_drift()):.5f}",
        "frozen_tensors": len(before),
        "frozen_identical": all(torch.equal(value, after[key]) for key, value in before.items()),
        "projector_moved": all(not torch.equal(moving[key], after[key]) for key in trained) and bool(trained),
        "ms_per_step": f"{1000 * seconds / num_steps:.0f}",
        "peak_gib": f"{torch.cuda.max_memory_allocated() / GIB:.2f}" if torch.cuda.is_available() else "",
        **machine(),
    }


def _means(reports: list[Any]) -> dict[str, float]:
    """Mean terms of some steps, and the loss that they make at beta 1 and omega 3."""
    names = ("cross_entropy", "distillation", "relational")
    terms = {name: sum(getattr(report, name) for report in reports) / len(reports) for name in names}
    return {**terms, "loss": terms["cross_entropy"] + terms["distillation"] + 3 * terms["relational"]}


@dataclass(frozen=True)
class Case:
    """A set-up of the published pair whose memory is measured."""

    name: str
    overrides: tuple[str, ...]


CASES = (
    Case("grace_2x512x16", ("data.micro_batch_size=2", "data.accumulation=16")),
    Case("grace_8x512x4", ("data.micro_batch_size=8", "data.accumulation=4")),
    Case("grace_2x512x16_fp8", ("data.micro_batch_size=2", "data.accumulation=16", "model.teacher_precision=fp8")),
    Case("grace_packed_4096_workers", ("data.packing=true", "data.max_batch_tokens=4096", "data.max_tokens=4096",
                                       "data.micro_batch_size=64", "data.accumulation=4", "data.workers=8")),
    Case("grace_packed_8192", ("data.packing=true", "data.max_batch_tokens=8192", "data.micro_batch_size=64",
                               "data.accumulation=2")),
    Case("grace_4x512x4_kept", ("data.micro_batch_size=4", "data.accumulation=4",
                                "runtime.gradient_checkpointing=false")),
    Case("kd_8x512x4", ("method=kd", "loss.adaptive=false", "data.micro_batch_size=8", "data.accumulation=4")),
    Case("qat_8x512x4", ("method=qat", "data.micro_batch_size=8", "data.accumulation=4")),
    Case("sft_8x512x4", ("method=sft", "scheme=bf16", "data.micro_batch_size=8", "data.accumulation=4")),
)  # fmt: skip


def published_recipe(name: str, student: str, teacher: str, rows: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of that name over ``rows``, with other models."""
    return load_recipe(
        Path(__file__).parent.parent / "recipes" / f"{name}.yaml",
        [f"model.student={student}", f"model.teacher={teacher}", "model.base=null", f"data.train={rows}",
         f"data.root={rows.parent}", *overrides],
    )  # fmt: skip


def bench_memory(case: Case, rows: Path, out: Path, pair: tuple[str, str], num_steps: int) -> dict[str, Any]:
    settings = (
        "data.packing=false",
        "runtime.cuda_graphs=false",
        "data.workers=0",
        f"optim.num_steps={num_steps}",
        *case.overrides,
    )
    recipe = published_recipe("qwen3_vl_2b_grace_w4g128", *pair, rows, settings)
    run = Run(recipe, out)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, waits, tokens, supervised, images = [], [], 0, 0, 0
    for report, took, waited in steps_of(run, num_steps):
        times.append(took)
        waits.append(waited)
        tokens, supervised, images = report.tokens, report.supervised_tokens, report.images
    run.loader.close()
    student = describe(recipe.model.student)
    teacher = describe(str(recipe.model.teacher)) if recipe.objective().needs_teacher else None
    num_rows = max(images, 1)
    encoder = run.loader.reader.preparer.encoder
    grid = run.loader.reader.preparer.prepare([0])[0][2][0].grid  # type: ignore[index]
    visual = encoder.adapter.num_visual_tokens(encoder.config, grid)
    load = Load(round(tokens / num_rows), visual, supervised / tokens)
    said = estimate(recipe, plan_for(recipe, student), student, teacher, load)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    median = sorted(times[1:] or times)[len(times[1:] or times) // 2]
    return {
        "case": case.name,
        "student": pair[0].removeprefix("random:"),
        "teacher": pair[1].removeprefix("random:") if teacher is not None else "",
        "tokens_per_step": tokens,
        "supervised_share": f"{supervised / tokens:.3f}",
        "peak_gib": f"{peak / GIB:.2f}",
        "estimated_gib": f"{said.peak_bytes / GIB:.2f}",
        "estimated_over_measured": f"{said.peak_bytes / peak:.3f}" if peak else "",
        "seconds_per_step": f"{median:.3f}",
        "estimated_seconds": f"{said.step_seconds('h100'):.3f}",
        "loader_seconds": f"{sorted(waits[1:] or waits)[len(waits[1:] or waits) // 2]:.3f}",
        "tokens_per_second": f"{tokens / median:.0f}",
        "tflop_per_second": f"{said.flop / median / 1e12:.0f}",
        **machine(),
    }


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=("families", "memory"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of families or cases")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--pair", nargs=2, default=PUBLISHED, help="student and teacher of the memory cases")
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.what == "families":
            rows = write_rows(folder / "data", 96, 20, 60)
            for name, pair in FAMILIES.items():
                if not args.only or name in args.only:
                    lines.append(bench_family(name, pair, rows, folder / name, args.steps or 20))
                    print(lines[-1], flush=True)
                    write_csv(args.out, lines)
                    release()
        else:
            rows = write_rows(folder / "data", 192, 32, 266)
            for case in CASES:
                if not args.only or case.name in args.only:
                    lines.append(bench_memory(case, rows, folder / case.name, tuple(args.pair), args.steps or 4))
                    print(lines[-1], flush=True)
                    write_csv(args.out, lines)
                    release()


def release() -> None:
    """Give the memory of the case before back."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
