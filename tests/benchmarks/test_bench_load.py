"""Load on the engine, on a toy: who waits is counted from arrival, every token once, and no page is left."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engine")]

import bench_load  # noqa: E402
from record import place_of, read_rows, write_rows  # noqa: E402
from worlds import DEVICE, loaded_toy, pictures  # noqa: E402

from grace_vlm.engine.engine import EngineOptions  # noqa: E402
from grace_vlm.engine.llm import LLM  # noqa: E402


@pytest.fixture(scope="module")
def llm() -> LLM:
    options = EngineOptions(cache_tokens=1024, max_running=4, max_step_tokens=64, picture_bytes=0)
    return LLM(loaded_toy("tiny"), options=options)


@pytest.fixture(scope="module")
def asked(llm: LLM, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    paths = pictures(tmp_path_factory.mktemp("pictures"), 4)
    return bench_load.requests(llm, paths, 12, prompt_tokens=(2, 90), answer_tokens=(1, 12))


def test_requests_are_mixed_and_always_the_same(llm: LLM, asked, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lengths = [len(prompt.ids) - len(prompt.visual) for prompt, _ in asked]
    assert len(set(lengths)) > 6
    assert [len(prompt.images) for prompt, _ in asked] == [1, 0, 0] * 4
    assert {params.max_tokens for _, params in asked} >= {1, 12} or len({p.max_tokens for _, p in asked}) > 4
    again = bench_load.requests(llm, pictures(tmp_path, 4), 12, prompt_tokens=(2, 90), answer_tokens=(1, 12))
    for (one, params), (other, same) in zip(asked, again, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.positions, other.positions)
        assert params == same
        assert one.positions.shape == (3, len(one.ids))
        # What was put behind a picture goes on after its largest position.
        text = one.positions[:, one.visual[-1] + 1 :] if len(one.visual) else one.positions
        assert (np.diff(text) == 1).all()


def test_arrivals_are_of_the_rate() -> None:
    asked = [(None, None)] * 4000
    assert {one.seconds for one in bench_load.arrivals(asked, None)} == {0.0}
    slow, fast = ([one.seconds for one in bench_load.arrivals(asked, rate)] for rate in (2.0, 8.0))
    assert slow[-1] == pytest.approx(2000, rel=0.05)
    assert np.allclose(slow, 4 * np.array(fast))
    gaps = np.diff(slow)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "an exponential's spread is its mean"


def test_every_token_is_counted_once(llm: LLM, asked, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    total = sum(params.max_tokens for _, params in asked)
    runs = []
    for rate in (None, 40.0):
        coming = bench_load.arrivals(asked, rate)
        waits = bench_load.measure(llm.engine, coming)
        assert waits.num_tokens == total
        assert len(waits.first_token) == len(asked)
        assert len(waits.between_tokens) == total - len(asked)
        assert waits.seconds >= coming[-1].seconds - coming[0].seconds
        # No request waits longer than the run, and the last one to begin waits least of all when they come slowly.
        assert 0 < max(waits.first_token) <= 1000 * waits.seconds
        assert sum(waits.between_tokens) <= 1000 * waits.seconds * len(asked)
        assert waits.pages_left == 0
        runs.append(waits)
    write_rows(tmp_path / "load.csv", bench_load.rows_of("all", "ours_bf16", runs, place_of(DEVICE)))
    rows = {row["metric"]: row for row in read_rows(tmp_path / "load.csv")}
    assert list(rows) == [
        "first_token_p50_ms", "first_token_p95_ms", "first_token_p99_ms",
        "between_tokens_p50_ms", "between_tokens_p95_ms", "between_tokens_p99_ms", "tok_s", "pages_left",
    ]  # fmt: skip
    for low, high in ((50, 95), (95, 99)):
        assert float(rows[f"first_token_p{low}_ms"]["p50"]) <= float(rows[f"first_token_p{high}_ms"]["p50"])
    mean = (np.percentile(runs[0].first_token, 95) + np.percentile(runs[1].first_token, 95)) / 2
    assert float(rows["first_token_p95_ms"]["p50"]) == pytest.approx(mean, rel=1e-4), "a run is a sample"
    assert rows["pages_left"]["p80"] == "0"


def test_a_page_that_is_not_given_back_is_an_error(asked) -> None:  # type: ignore[no-untyped-def]
    leaking = LLM(loaded_toy("tiny"), options=EngineOptions(cache_tokens=4096))
    leaking.engine.pages.take(1)
    with pytest.raises(AssertionError, match="1 pages were not given back"):
        bench_load.measure(leaking.engine, bench_load.arrivals(asked[:2], None))


def test_a_word_that_is_no_rate_is_none() -> None:
    assert bench_load.rates_of("2,0.5,all") == {"rate2": 2.0, "rate0.5": 0.5, "all": None}
    for text in ("2,", "x", "0", "-1", "inf", "nan"):
        assert bench_load.rates_of(text) is None, text
