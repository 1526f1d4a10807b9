"""Training steps on several GPUs: the same 16 rows of 512 tokens on one and on all, whole steps, Qwen3-VL-2B under 8B.

    torchrun --standalone --nproc-per-node 1 benchmarks/bench_scaling.py       # -> benchmarks/results/scaling.csv
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_scaling.py
    torchrun --standalone --nproc-per-node 1 benchmarks/bench_scaling.py --cases ddp_teacher_gpu       # two GPUs
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_scaling.py --toy --out /tmp/toy.csv      # CPU: the script

Micro-batches of 8 rows, two of them a step, shared out to the processes; rows and models as in ``bench_train.py``.

    ddp            runtime.sharding=optimizer, as the published recipe has it: decoders as CUDA graphs
    ddp_launches   the same without graphs, which the sharded cases cannot have
    ddp_codes      and leaves gathered as codes (runtime.gather)
    zero2, fsdp2   runtime.sharding=gradients, parameters
    fsdp2_teacher  and the teacher's layers shared out too (model.teacher_sharding)

Impl ``gpus2``: so many processes, a GPU each. Metrics: ``ms`` of a whole step of the first process, which waits for
the others in every one; ``tokens_per_second``; ``peak_gib``, the most of any process; ``sent_gb`` out of a process a
step, by what rings send (``Ranks.sent_bytes``); and, where the file has ``ddp`` on one GPU of that name,
``efficiency``: its ms over (GPUs x ms). Compare rows of one machine only.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench_train import EIGHT, QWEN, SMALL, Measured, clean_gpu, measure_ours, recipe_of
from bench_true_size import write_rows
from record import Row, gpu, place_of, read_rows, results_file, row_of
from record import write_rows as write_csv

from grace_vlm.train.ranks import Ranks

LAUNCHES = (*EIGHT, "data.accumulation=2", "runtime.cuda_graphs=false")
CASES = {
    "ddp": (*EIGHT, "data.accumulation=2"),
    "ddp_launches": LAUNCHES,
    "ddp_codes": (*LAUNCHES, "runtime.gather=codes"),
    "zero2": (*LAUNCHES, "runtime.sharding=gradients"),
    "fsdp2": (*LAUNCHES, "runtime.sharding=parameters"),
    "fsdp2_teacher": (*LAUNCHES, "runtime.sharding=parameters", "model.teacher_sharding=parameters"),
    "ddp_fp8_adam8": (*EIGHT, *SMALL, "model.teacher_precision=fp8", "data.accumulation=2"),
    "ddp_32x512": (*EIGHT, "data.accumulation=4"),
    "ddp_teacher_gpu": (*EIGHT, "data.accumulation=2", "model.teacher_device=cuda:1"),
}
SHARED = ("ddp", "ddp_launches", "ddp_codes", "zero2", "fsdp2", "fsdp2_teacher")
ALONE = SHARED[:2]
"""Without those that share nothing on one GPU."""
SAME_WORK = (*SHARED, "ddp_teacher_gpu")
"""Cases that are compared with ``ddp`` on one GPU."""
TOY = ("toy:student", "toy:teacher", QWEN[2])
TOY_SETTINGS = ("runtime.cuda_graphs=false", "data.micro_batch_size=2", "data.workers=0", "data.max_pixels=16384")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--cases", nargs="*", choices=list(CASES), help="default: ddp, ddp_launches; on several GPUs more"
    )
    made.add_argument("--steps", type=int, default=16, help="timed, of a case")
    made.add_argument("--toy", action="store_true", help="toy models on CPUs: whether the script runs, no speed")
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    with Ranks.started("cpu" if args.toy else gpu().type) as ranks, tempfile.TemporaryDirectory() as temporary:
        names = args.cases or (ALONE if ranks.count == 1 else SHARED)
        place = place_of(ranks.device)
        path = args.out or results_file("scaling", ranks.device)
        # The same on every process.
        rows = write_rows(Path(temporary) / "rows", *((64, 4, 6, 128) if args.toy else (768, 32, 266)))
        for name in names:
            recipe = recipe_of(rows, (*CASES[name], *TOY_SETTINGS), TOY) if args.toy else recipe_of(rows, CASES[name])
            with clean_gpu():
                own = measure_ours(recipe, Path(temporary) / name, args.steps, ranks=ranks)
            found = [Measured(**values) for values in ranks.gather(vars(own))]
            if ranks.is_first:
                keep(path, name, ranks.count, found, place)


def keep(path: Path, name: str, count: int, found: list[Measured], place: Row) -> None:
    """Rows of a case."""
    first, impl = found[0], f"gpus{count}"
    speed = [tokens * 1000 / ms for tokens, ms in zip(first.tokens, first.milliseconds, strict=True)]
    values = {
        "ms": (first.milliseconds, "ms"),
        "tokens_per_second": (speed, "1/s"),
        "peak_gib": ([max(measured.peak_gib for measured in found)], "GiB"),
        "sent_gb": ([first.sent_gb], "GB"),
    }
    if first.teacher_peak_gib is not None:
        values["teacher_peak_gib"] = ([first.teacher_peak_gib], "GiB")
    alone = alone_ms(path, place)
    gpus = count + (name == "ddp_teacher_gpu")
    if name in SAME_WORK and alone is not None and gpus > 1:
        values["efficiency"] = ([alone / (gpus * ms) for ms in first.milliseconds], "1")
    rows = [row_of("scaling", name, impl, metric, samples, unit, place) for metric, (samples, unit) in values.items()]
    print(name, impl, *(f"{row['metric']} {row['p50']}" for row in rows), flush=True)
    write_csv(path, rows)


def alone_ms(path: Path, place: Row) -> float | None:
    """Median ms of ``ddp`` on one such GPU, if it has been measured."""
    key = ("ddp", "gpus1", "ms", place["device"])
    rows = read_rows(path) if path.exists() else []
    found = [row for row in rows if (row["case"], row["impl"], row["metric"], row["device"]) == key]
    return float(found[0]["p50"]) if found else None


if __name__ == "__main__":
    main()
