"""What the benchmarks of the engine measure, on a toy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engine")]

import bench_decode  # noqa: E402
import bench_ttft  # noqa: E402
from worlds import loaded_toy  # noqa: E402

from grace_vlm.engine.engine import Engine, EngineOptions  # noqa: E402
from grace_vlm.engine.llm import LLM  # noqa: E402


def test_all_rows_run_while_it_is_timed() -> None:
    engine = Engine(loaded_toy("tiny"), options=EngineOptions(max_running=3))
    for _ in range(2):
        speed, steps = bench_decode.measure_engine(engine, 3, 20, 9)
        # The first request has its first token one step before the others' at most, and ends as much earlier.
        assert 6 <= len(steps) <= 8
        assert speed == pytest.approx(3000 * len(steps) / sum(steps), rel=0.05)
        assert not engine.has_work
        assert engine.pages.num_free == engine.pages.num_pages


def test_transformers_is_asked_for_as_many() -> None:
    speed, steps = bench_decode.measure_transformers(loaded_toy("tiny"), 2, 16, 9, compiled=False)
    assert len(steps) == 3
    assert speed == pytest.approx(2000 * 3 / sum(steps))


def test_every_linear_of_the_decoder_is_quantized() -> None:
    loaded = loaded_toy("student")
    codes = bench_decode.quantized(loaded.model)
    assert len(codes) == 7 * loaded.model.config.text_config.num_hidden_layers
    assert {tensor.scheme.group_size for tensor in codes.values()} == {128}
    rows = bench_decode.memory_rows("ours_w4", loaded, Engine(loaded, codes), {"device": "cpu"})
    assert [row["case"] for row in rows] == ["all", "decoder"]
    assert float(rows[0]["p50"]) > float(rows[1]["p50"]) > 0


def test_every_picture_is_a_new_one(tmp_path: Path) -> None:
    paths = bench_ttft.write_pictures(tmp_path, 3)
    assert len({path.read_bytes() for path in paths}) == 3
    llm = LLM(loaded_toy("tiny"))
    assert len(bench_ttft.measure_ours(llm, paths)) == 3
    assert llm.engine.pictures.num_made == 3
    assert len(bench_ttft.measure_transformers(loaded_toy("tiny"), paths[:2])) == 2
