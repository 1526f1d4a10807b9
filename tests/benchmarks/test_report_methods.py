"""The tables of docs/results.md: pairing, intervals, rows that stand twice."""

from __future__ import annotations

import csv
import math
import random
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_methods  # noqa: E402
import report_methods as report  # noqa: E402


def row(name: str, seed: str, bits: str) -> dict[str, str]:
    return {
        "name": name,
        "scheme": "w4g128",
        "seed": seed,
        "num_scored": str(len(bits)),
        "correct": f"{int(bits, 2):x}",
    }


def test_bits_come_back_with_their_leading_zeros() -> None:
    outcomes = report.load_outcomes([row("qat", "0", "0010")])
    assert outcomes["qat", "w4g128"]["0"] == [0, 0, 1, 0]


def test_a_row_that_stands_twice_is_an_error() -> None:
    with pytest.raises(SystemExit, match="qat w4g128 seed 0 stands in the CSV twice"):
        report.load_outcomes([row("qat", "0", "01"), row("qat", "0", "11")])


def test_only_seeds_that_both_have_are_paired() -> None:
    first, second = {"0": [1], "1": [0], "2": [1]}, {"0": [0], "2": [1]}
    assert report.common_seeds(first, second) == ({"0": [1], "2": [1]}, second)
    once = {"": [1]}
    assert report.common_seeds(first, once) == (first, {"0": [1], "1": [1], "2": [1]})
    assert report.common_seeds(once, first) == ({"0": [1], "1": [1], "2": [1]}, first)


def test_the_interval_is_that_of_a_mean_over_pictures() -> None:
    """With equally many questions a picture, the cluster-robust error is the error of the mean of picture means."""
    rng = random.Random(0)
    pictures = [f"p{i // 5}" for i in range(200)]
    first = {seed: [int(rng.random() < 0.7) for _ in pictures] for seed in "012"}
    second = {seed: [int(rng.random() < 0.6) for _ in pictures] for seed in "012"}
    mean, half, p = report.difference(first, second, pictures)
    deltas = [sum(first[s][i] - second[s][i] for s in "012") / 3 for i in range(200)]
    means = [statistics.mean(deltas[at : at + 5]) for at in range(0, 200, 5)]
    error = statistics.stdev(means) / math.sqrt(len(means))
    assert mean == pytest.approx(100 * statistics.mean(means))
    assert half == pytest.approx(196 * error)
    assert p == pytest.approx(math.erfc(statistics.mean(means) / error / math.sqrt(2)))


def test_the_committed_rows_are_the_jobs_of_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    all_jobs = bench_methods.all_jobs(bench_methods.best_rates())
    jobs = [job.key for job in all_jobs]
    assert len(set(jobs)) == len(jobs)
    with (ROOT / "benchmarks" / "results" / "methods_run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {tuple(r[key] for key in ("name", "scheme", "seed", "learning_rate")) for r in rows} == set(jobs)
    methods = {job.key: bench_methods.recipe_of(job).method for job in all_jobs if job.seed is not None}
    for r in rows:
        key = tuple(r[field] for field in bench_methods.KEY)
        assert r["method"] == methods.get(key, r["name"])
        assert bin(int(r["correct"], 16)).count("1") == int(r["num_correct"])
        assert float(r["accuracy"]) == pytest.approx(int(r["num_correct"]) / int(r["num_scored"]), abs=1e-5)
