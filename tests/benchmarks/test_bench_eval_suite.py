"""bench_eval_suite.py: engine and suite are asked the same; lmms-eval's part needs its own environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

import bench_eval_suite as bench  # noqa: E402
from record import read_rows  # noqa: E402


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--impls", "engine,suite", "--samples", "110", "--rounds", "1", "--batch", "16", "--out", str(out)]
    assert bench.main(arguments) == 0
    rows = read_rows(out)
    assert {(row["case"], row["impl"], row["metric"]) for row in rows} == {
        ("toy_student_short_b16", impl, metric)
        for impl in ("engine", "suite")
        for metric in ("samples_s", "samples_cpu_s")
    }
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("round 1")]
    tokens = [line.split(" s, ")[1].split(" ")[0] for line in said]
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]


def test_a_model_that_never_ends(tmp_path: Path) -> None:
    made = bench.prepared(bench.MODEL, tmp_path / "model", never_ends=True)
    assert not list(made.glob("manifest*"))
    assert json.loads((made / "tokenizer_config.json").read_text())["eos_token"] == bench.NEVER_SAID
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] != 513
    rows = bench.write_benchmark(tmp_path, 4)
    one = bench.suite_turn(str(made), rows, 4, "cpu")()
    assert (one.replies, one.tokens) == (4, 4 * 128)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--impls", "suite,lmms_hf"], "lmms-eval has an environment of its own; pass --lmms-python"),
        (["--impls", "suite", "--rounds", "0"], "--samples, --batch, --rounds and --threads must be at least 1"),
        (["--impls", "suite", "--model", "nowhere"], "nowhere/config.json is no file; pass --model"),
    ],
)
def test_settings(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.settings(arguments)
    assert line in capsys.readouterr().err
