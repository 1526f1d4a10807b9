"""Training steps on several GPUs: the same global batch on one and on all, whole steps, Qwen3-VL-2B under 8B.

    torchrun --standalone --nproc-per-node 1 benchmarks/bench_scaling.py       # -> benchmarks/results/scaling.csv
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_scaling.py
    torchrun --standalone --nproc-per-node 1 benchmarks/bench_scaling.py --cases grace_16x512_teacher_gpu  # two GPUs

Case ``grace_16x512``: micro-batches of 8 rows of 512 tokens, two of them a step, shared out to the processes. Rows and
models are those of ``bench_train.py``. Impl ``gpus2``: so many processes, a GPU each; metrics ``ms`` of a whole step
and ``peak_gib``, the most of any process. Efficiency is ms of one process over (processes x ms of them); compare rows
of one machine only.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench_train import EIGHT, Measured, clean_gpu, measure_ours, recipe_of
from bench_true_size import write_rows
from record import place_of, results_file, row_of
from record import write_rows as write_csv

from grace_vlm.train.ranks import Ranks

SMALL = ("optim.moments=8bit", "model.teacher_precision=fp8", "runtime.loss_workspace_mib=128")
CASES = {
    "grace_16x512": (*EIGHT, "data.accumulation=2"),
    "grace_16x512_fp8_adam8": (*EIGHT, *SMALL, "data.accumulation=2"),
    "grace_32x512": (*EIGHT, "data.accumulation=4"),
    "grace_16x512_teacher_gpu": (*EIGHT, "data.accumulation=2", "model.teacher_device=cuda:1"),
}
DEFAULT = ("grace_16x512", "grace_16x512_fp8_adam8")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", nargs="*", default=DEFAULT, choices=list(CASES))
    made.add_argument("--steps", type=int, default=16, help="timed, of a case")
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    with Ranks.started("cuda") as ranks, tempfile.TemporaryDirectory() as temporary:
        place = place_of(ranks.device)
        path = args.out or results_file("scaling", ranks.device)
        rows = write_rows(Path(temporary) / "rows", 768, 32, 266)  # the same on every process
        for name in args.cases:
            recipe = recipe_of(rows, CASES[name])
            with clean_gpu():
                own = measure_ours(recipe, Path(temporary) / name, args.steps, ranks=ranks)
            found = [Measured(**values) for values in ranks.gather(vars(own))]
            if ranks.is_first:
                keep(path, name, ranks.count, found, place)


def keep(path: Path, name: str, count: int, found: list[Measured], place: dict[str, str]) -> None:
    """Rows of a case: times of the first process, which waits for the others in every step."""
    first, impl = found[0], f"gpus{count}"
    speed = [tokens * 1000 / ms for tokens, ms in zip(first.tokens, first.milliseconds, strict=True)]
    values = {
        "ms": (first.milliseconds, "ms"),
        "tokens_per_second": (speed, "1/s"),
        "peak_gib": ([max(measured.peak_gib for measured in found)], "GiB"),
    }
    if first.teacher_peak_gib is not None:
        values["teacher_peak_gib"] = ([first.teacher_peak_gib], "GiB")
    rows = [row_of("scaling", name, impl, metric, samples, unit, place) for metric, (samples, unit) in values.items()]
    print(name, impl, *(f"{row['metric']} {row['p50']}" for row in rows), flush=True)
    write_csv(path, rows)


if __name__ == "__main__":
    main()
