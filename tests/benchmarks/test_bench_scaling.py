"""bench_scaling.py: its cases are recipes, its efficiency is of one GPU's time, and its toy form runs on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_scaling as bench  # noqa: E402
import record  # noqa: E402
from bench_train import Measured, recipe_of  # noqa: E402

PLACE = {"device": "GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "c", "date": "2026-11-29"}


def test_every_case_is_a_recipe_and_the_compared_ones_are_the_same_step(tmp_path: Path) -> None:
    recipes = {name: recipe_of(tmp_path / "rows.jsonl", settings) for name, settings in bench.CASES.items()}
    assert {recipes[name].data for name in bench.SAME_WORK} == {recipes["ddp"].data}
    assert {name: recipe.runtime.sharding for name, recipe in recipes.items() if recipe.runtime.sharding} == {
        "zero2": "gradients",
        "fsdp2": "parameters",
        "fsdp2_teacher": "parameters",
    }
    assert recipes["fsdp2_teacher"].model.teacher_sharding == "parameters"
    assert recipes["ddp"].runtime.cuda_graphs
    assert not recipes["ddp_launches"].runtime.cuda_graphs


def test_efficiency_is_of_ddp_on_one_such_gpu(tmp_path: Path) -> None:
    out = tmp_path / "scaling.csv"
    step = Measured([100.0, 110.0, 120.0], [8192] * 3, 40.0)
    bench.keep(out, "fsdp2", 2, [step, step], PLACE)
    assert "efficiency" not in {row["metric"] for row in record.read_rows(out)}
    bench.keep(out, "ddp", 1, [Measured([200.0] * 3, [8192] * 3, 60.0)], PLACE)
    bench.keep(out, "fsdp2", 2, [step, Measured([1.0] * 3, [8192] * 3, 41.0, sent_gb=9.0)], PLACE)
    bench.keep(out, "ddp_32x512", 2, [step, step], PLACE)
    rows = {(row["case"], row["impl"], row["metric"]): row for row in record.read_rows(out)}
    assert float(rows["fsdp2", "gpus2", "efficiency"]["p50"]) == pytest.approx(200 / (2 * 110), rel=1e-5)
    assert float(rows["fsdp2", "gpus2", "peak_gib"]["p50"]) == 41.0
    assert ("ddp_32x512", "gpus2", "efficiency") not in rows, "twice the rows"
    bench.keep(out, "zero2", 2, [step, step], {**PLACE, "device": "another GPU"})
    assert not [row for row in record.read_rows(out) if (row["case"], row["metric"]) == ("zero2", "efficiency")]


@pytest.mark.soak
@pytest.mark.skipif("GRACE_FAULTS" in os.environ, reason="GRACE_FAULTS asks for a part of the soak")
def test_the_toy_form_runs_every_sharding(tmp_path: Path) -> None:
    out = tmp_path / "toy.csv"
    for count in (1, 2):
        words = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            ROOT / "benchmarks/bench_scaling.py",
        ]
        subprocess.run(
            [sys.executable, "-m", *map(str, words), "--toy", "--steps", "1", "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300, capture_output=True,
        )  # fmt: skip
    rows = {(row["case"], row["metric"]): float(row["p50"]) for row in record.read_rows(out) if row["impl"] == "gpus2"}
    assert {case for case, _ in rows} == set(bench.SHARED)
    assert rows["ddp_codes", "sent_gb"] < rows["ddp", "sent_gb"] < rows["fsdp2", "sent_gb"]
    assert rows["fsdp2", "sent_gb"] < rows["fsdp2_teacher", "sent_gb"]
