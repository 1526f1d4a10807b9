"""bench_engine_divergence.py on toys: what it reads, what it calls a first difference, and what it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engine")]

import bench_engine_divergence as bench  # noqa: E402
import record  # noqa: E402
from worlds import loaded_toy  # noqa: E402

from grace_vlm.engine.engine import EngineOptions  # noqa: E402
from grace_vlm.engine.llm import LLM  # noqa: E402
from grace_vlm.engine.sampling import SamplingParams  # noqa: E402
from grace_vlm.models.toy import build_toy_processor  # noqa: E402

PARAMS = SamplingParams(max_tokens=6)


def test_a_language_model_alone_is_read_and_answers_as_by_itself() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, eos_token_id=383,
    )  # fmt: skip
    causal = LlamaForCausalLM(config).eval()
    prompt = next(bench.text_prompts(list(range(5, 45)), 1, 40))
    ids = torch.from_numpy(prompt.ids).unsqueeze(0)
    answer = causal.generate(ids, max_new_tokens=6, do_sample=False)[0, 40:].tolist()
    logits = causal(torch.tensor([[*prompt.ids.tolist(), *answer]])).logits[0, 39:].double()
    loaded = bench.text_model(causal, build_toy_processor(["yes"] * 3).tokenizer)
    [found] = bench.reads_of(bench.engine_of("reference", loaded, {}), [prompt], SamplingParams(max_tokens=6))
    assert list(found.answer) == answer
    torch.testing.assert_close(found.log_probs, logits.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_the_reference_itself_is_at_no_distance_and_a_coarser_cache_is_farther(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(bench.OPTIONS, "itself", EngineOptions())
    llm = LLM(loaded_toy("tiny"))
    prompts = [llm.prompt(text) for text in ("yes", "is there a red circle?", "count the blue triangles, please")]
    impls = ("itself", "bf16_cache", "fp8_cache")
    rows = bench.compare("toy_student", lambda: (loaded_toy("tiny"), {}), prompts, PARAMS, impls)
    found = {(row["impl"], row["metric"]): float(row["p50"]) for row in rows}
    assert found["itself", "kl_mean"] < 1e-12
    assert found["itself", "top1"] == found["itself", "same_answer"] == 1
    assert ("itself", "gap") not in found
    assert 1e-12 < found["bf16_cache", "kl_mean"] < found["fp8_cache", "kl_mean"] / 20 < 0.1
    assert "toy student, scenes | cache in E4M3" in bench.table(rows)


def test_bytes_are_near_the_exact_product() -> None:
    llm = LLM(loaded_toy("tiny"))
    prompts = [llm.prompt(text) for text in ("yes", "is there a red circle?")]
    rows = bench.compare(
        "toy_student_w4",
        lambda: bench.on_a_grid(loaded_toy("tiny")),
        prompts,
        PARAMS,
        ("reference", "int8_activations"),
    )
    found = {row["impl"]: float(row["p50"]) for row in rows if row["metric"] == "kl_mean"}
    assert found["reference"] < 1e-12
    assert 1e-12 < found["int8_activations"] < 0.05


def test_where_two_answers_part() -> None:
    def read(answer: tuple[int, ...], likeliest: list[int]) -> bench.Read:
        logits = torch.zeros(len(likeliest), 9, dtype=torch.float64)
        logits[torch.arange(len(likeliest)), likeliest] = 2.0
        return bench.Read(answer, logits.log_softmax(-1))

    ours = read((4, 5), [4, 5, 8])
    assert bench.parting(ours, read((4, 5), [4, 5, 8])) is None
    assert bench.parting(ours, read((4, 6, 7), [4, 6, 8])) == (1, pytest.approx(2.0))
    assert bench.parting(ours, read((4,), [4, 8, 8])) == (1, pytest.approx(2.0))
    assert bench.parting(ours, read((4, 5, 5), [4, 5, 5])) == (2, pytest.approx(2.0))


def test_the_standard_file_holds_every_cell_of_the_table() -> None:
    rows = record.read_rows(bench.OUT)
    lines = bench.table(rows).splitlines()
    assert len(lines) == 2 + 2 * len(bench.SAYS) + 2, "three options and their grid's, of two models"
    assert {row["device"] for row in rows} == {"cpu"}
