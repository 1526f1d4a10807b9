"""Curves of the toy pair under the fused, the reference and the official loss, beside those of another seed.

    make demo                                        # makes runs/demo/data
    python benchmarks/bench_loss_curves.py           # -> benchmarks/results/loss_curves.csv

Trains recipes/toy_grace_w4g128.yaml 200 steps, four times. The CSV has, for every pair with the fused run of seed 0,
the mean absolute difference of each curve over the steps, and of the last 50.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import torch
import transformers

from grace_vlm.train.config import load_recipe
from grace_vlm.train.loop import train
from grace_vlm.train.record import read_metrics

CURVES = ("loss", "cross_entropy", "distillation", "relational", "grad_norm")
RUNS = (("fused", 0), ("reference", 0), ("official", 0), ("fused", 1))
COLUMNS = ("pair", "curve", "mean", "difference", "difference_last_50", "num_steps", "seconds", "hardware", "versions")


def run(recipe: Path, data: Path, num_steps: int, implementation: str, seed: int) -> tuple[torch.Tensor, float]:
    """(steps, curves) and the seconds of all steps."""
    overrides = [
        f"data.train={data}",
        f"optim.num_steps={num_steps}",
        f"loss.implementation={implementation}",
        f"runtime.seed={seed}",
        "runtime.checkpoint_every_steps=0",
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(load_recipe(recipe, overrides), out)
        lines = read_metrics(out / "metrics.jsonl")
    return torch.tensor([[line[name] for name in CURVES] for line in lines]), sum(
        float(line["tokens"] / line["tokens_per_second"]) for line in lines
    )


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipe", type=Path, default=Path("recipes/toy_grace_w4g128.yaml"))
    made.add_argument("--data", type=Path, default=Path("runs/demo/data/train_questions.jsonl"))
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_curves.csv"))
    args = made.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    curves = {}
    rows: list[tuple[object, ...]] = []
    for implementation, seed in RUNS:
        key = f"{implementation} seed {seed}"
        curves[key], seconds = run(args.recipe, args.data, args.steps, implementation, seed)
        gap = (curves[key] - curves["fused seed 0"]).abs()
        for number, curve in enumerate(CURVES):
            values = (curves[key][:, number].mean(), gap[:, number].mean(), gap[-50:, number].mean())
            told = [f"{float(value):.6g}" for value in values]
            rows.append((key, curve, *told, args.steps, f"{seconds:.1f}", name, versions))
            print(*rows[-1][:5], f"{seconds:.1f} s", flush=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
