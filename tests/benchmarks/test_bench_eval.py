"""bench_eval.py: both programs are asked the same, and what is written of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toy_run import write_models, write_rows
from worlds import stock_tokens

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import bench_eval as bench  # noqa: E402
from record import read_rows  # noqa: E402

from grace_vlm.models.load import load_model  # noqa: E402
from grace_vlm.ptq.quantize import quantize_folder  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a toy and the same on a grid of 4 bits."""
    folder = tmp_path_factory.mktemp("eval")
    write_rows(folder, 8)
    write_models(folder)
    quantize_folder(str(folder / "student"), folder / "rtn_w4", "w4g128", scale="minmax")
    return folder


def test_both_answer_the_same_questions(world: Path) -> None:
    """Batches of different sizes, the last one smaller, and each question as Transformers answers it alone."""
    model, data = str(world / "student"), world / "rows.jsonl"
    stock = bench.stock_turn(model, data, 7, 3)()
    ours = bench.our_turn(model, data, 7, 2, "fp32")
    loaded = load_model(model, "cpu")
    for number, text in enumerate(stock):
        tokens = stock_tokens(loaded, "what color is the square?", [world / "images" / f"{number}.png"], 16)
        assert loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert ours() == stock
    assert ours() == stock, "a turn leaves nothing behind"


def test_rows(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--model", str(world / "rtn_w4"), "--data", str(world / "rows.jsonl"), "--questions", "8"]
    assert bench.main([*arguments, "--batches", "4,8", "--rounds", "2", "--threads", "1", "--out", str(out)]) == 0
    rows = read_rows(out)
    assert {(row["case"], row["impl"]) for row in rows} == {
        (case, impl) for case in ("rtn_w4_b4", "rtn_w4_b8") for impl in bench.IMPLS
    }
    assert {(row["bench"], row["metric"], row["unit"]) for row in rows} == {("cpu_eval", "questions_s", "1/s")}
    assert all(0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    assert "rtn_w4_b4: transformers has 8 of 8 answers of transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--impls", "ours"), f"--impls 'ours' is no implementation; there are {', '.join(bench.IMPLS)}"),
        (("--batches", "64,0"), "--batches has '0'; expected NUMBER, for example 64"),
        (("--rounds", "0"), "--questions, --rounds and --threads must be at least 1"),
        (("--model", "nowhere"), "nowhere/config.json is no file; run grace demo, or pass --model and --data"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(list(arguments))
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
