"""Reading prompts, on a toy: every impl reads the same prompts, and rows say what was timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engine")]

import bench_prefill  # noqa: E402
from record import place_of, read_rows, write_rows  # noqa: E402
from worlds import loaded_toy, on_a_cpu  # noqa: E402

CASES = bench_prefill.cases_of("b1_p40,b3_p70")


@on_a_cpu
@pytest.mark.parametrize("size", ["tiny", "qwen2_vl", "llava"])
def test_all_impls_read_the_same_prompts(size: str) -> None:
    """Whole prompts and prompts in pieces; a row for every prompt."""
    assert CASES is not None
    stock = bench_prefill.reader("transformers_bf16", loaded_toy(size), bench_prefill.options_for(CASES, 512))
    for step_tokens in (512, 32):
        ours = bench_prefill.reader("ours_bf16", loaded_toy(size), bench_prefill.options_for(CASES, step_tokens))
        for case in CASES:
            tokens = ours(case)
            assert tokens == stock(case)
            assert len(tokens) == case.count
    assert len(set(tokens)) > 1, "prompts that all end alike would hide one read for another"


def test_rows_say_what_was_timed(tmp_path: Path) -> None:
    assert CASES is not None
    device, options, ran = torch.device("cpu"), bench_prefill.options_for(CASES, 512), []
    found = {impl: bench_prefill.reader(impl, loaded_toy("student"), options) for impl in bench_prefill.IMPLS}

    def seen(impl: str):  # type: ignore[no-untyped-def]
        return lambda case: ran.append(impl) or found[impl](case)

    readers = {impl: seen(impl) for impl in found}
    for case in CASES:
        rows = bench_prefill.measure(case, readers, device, 3, place_of(device))
        write_rows(tmp_path / "prefill.csv", rows)
        for ms, speed in zip(rows[::2], rows[1::2], strict=True):
            assert float(speed["p50"]) == pytest.approx(1000 * case.count * case.length / float(ms["p50"]), rel=1e-4)
            assert float(ms["p20"]) <= float(ms["p50"]) <= float(ms["p80"])
    assert ran == list(bench_prefill.IMPLS) * 5 * 2, "impls run in turns"
    written = read_rows(tmp_path / "prefill.csv")
    assert [(row["case"], row["impl"], row["metric"], row["unit"]) for row in written] == [
        (case.name, impl, metric, unit)
        for case in CASES
        for impl in bench_prefill.IMPLS
        for metric, unit in (("ms", "ms"), ("tok_s", "1/s"))
    ]


def test_a_word_that_is_no_case_is_none() -> None:
    assert bench_prefill.cases_of("b1_p512,b0_p3") is None
    assert bench_prefill.cases_of("b1_c512") is None
    assert bench_prefill.cases_of("b8_p2048") == [bench_prefill.Case("b8_p2048", 8, 2048)]
