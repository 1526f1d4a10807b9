"""Reading prompts: tokens a second and milliseconds from text tokens to each request's first token (needs a CUDA GPU).

    python benchmarks/bench_prefill.py                                  # -> benchmarks/results/prefill.csv
    python benchmarks/bench_prefill.py --cases b1_p2048 --impls ours_w4,transformers_bf16
    python benchmarks/bench_prefill.py --model random:Qwen/Qwen3-VL-2B-Instruct:2 --device cpu --cases b2_p64

Case ``b8_p2048``: 8 prompts of 2,048 text tokens each, asked at once. Metric ``ms``: until the first token of every one
of them is on the host; ``tok_s``: tokens of prompts a second, from the same runs. Random weights at the true sizes, the
same for all; all impls are in memory at once and run in turns. The cache is BF16 and takes part.

    ours_w4, ours_bf16   engine/; a forward takes --step-tokens at most, longer prompts are cut
    transformers_bf16    Transformers' decoder on all prompts at once, SDPA; the head reads the last tokens alone
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_decode import open_random, prompts, quantized
from record import Call, Row, place_of, results_file, row_of, time_interleaved, write_rows

from grace_vlm.engine.cache import PAGE_TOKENS, pages_for
from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.models.load import LoadedModel

CASES = "b1_p512,b1_p2048,b1_p8192,b8_p512,b8_p2048,b8_p8192"
IMPLS = ("ours_w4", "ours_bf16", "transformers_bf16")


@dataclass(frozen=True)
class Case:
    """So many prompts of so many tokens."""

    name: str
    count: int
    length: int

    @property
    def cache_tokens(self) -> int:
        return self.count * pages_for(self.length) * PAGE_TOKENS


def read_by_engine(engine: Engine, case: Case) -> list[int]:
    """First tokens of all requests, in order."""
    params, first = SamplingParams(max_tokens=1, ignore_eos=True), dict[str, int]()
    for number, prompt in enumerate(prompts(case.count, case.length, engine.weights.embeddings.num_words)):
        engine.add(f"{number}", prompt, params)
    while engine.has_work:
        first |= {event.request_id: event.choice.token for event in engine.step() if event.choice}
    return [first[f"{number}"] for number in range(case.count)]


@torch.inference_mode()
def read_by_transformers(loaded: LoadedModel, case: Case) -> list[int]:
    """The same of Transformers' own decoder, with the cache that it makes for itself."""
    model, device = loaded.model, next(loaded.model.parameters()).device
    language = model.model.language_model
    assert language.config._attn_implementation == "sdpa"
    words = model.config.get_text_config().vocab_size
    ids = torch.from_numpy(np.stack([prompt.ids for prompt in prompts(case.count, case.length, words)])).to(device)
    states = language(input_ids=ids, use_cache=True)
    tokens: list[int] = loaded.adapter.head(model)(states.last_hidden_state[:, -1]).argmax(-1).tolist()
    return tokens


def reader(impl: str, loaded: LoadedModel, options: EngineOptions) -> Callable[[Case], list[int]]:
    """What an impl does with a case; an engine takes the model's layers over."""
    if impl == "transformers_bf16":
        return lambda case: read_by_transformers(loaded, case)
    engine = Engine(loaded, quantized(loaded.model) if impl == "ours_w4" else {}, options)
    return lambda case: read_by_engine(engine, case)


def measure(
    case: Case, readers: dict[str, Callable[[Case], list[int]]], device: torch.device, iterations: int, place: Row
) -> list[Row]:
    """Rows of one case, impl by impl."""

    def call(read: Callable[[Case], list[int]]) -> Call:
        return lambda: read(case)

    times = time_interleaved({impl: call(read) for impl, read in readers.items()}, device, iterations, warmup=2)
    rows = []
    for impl, samples in times.items():
        speeds = [1000 * case.count * case.length / milliseconds for milliseconds in samples]
        rows.append(row_of("prefill", case.name, impl, "ms", samples, "ms", place))
        rows.append(row_of("prefill", case.name, impl, "tok_s", speeds, "1/s", place))
    return rows


def cases_of(text: str) -> list[Case] | None:
    """Cases by their names with commas; None if one is no name."""
    found = [re.fullmatch(r"b([1-9]\d*)_p([1-9]\d*)", name) for name in text.split(",")]
    return [Case(match[0], int(match[1]), int(match[2])) for match in found if match] if all(found) else None


def options_for(cases: Sequence[Case], step_tokens: int) -> EngineOptions:
    """An engine in which every case runs at once."""
    return EngineOptions(
        cache_tokens=max(case.cache_tokens for case in cases),
        max_running=max(case.count for case in cases),
        max_step_tokens=step_tokens,
    )


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="random:Qwen/Qwen3-VL-2B-Instruct")
    made.add_argument("--cases", default=CASES, help="bPROMPTS_pTOKENS with commas")
    made.add_argument("--impls", default=",".join(IMPLS))
    made.add_argument("--step-tokens", type=int, default=8_192, help="of one forward of the engine")
    made.add_argument("--iterations", type=int, default=20, help="timed, of every impl; two more come before")
    made.add_argument("--device", default="cuda")
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    device, cases, impls = torch.device(args.device), cases_of(args.cases), args.impls.split(",")
    if cases is None:
        made.error("--cases has a word that is no bPROMPTS_pTOKENS, for example b8_p2048")
    if unknown := [impl for impl in impls if impl not in IMPLS]:
        made.error(f"--impls has {unknown[0]!r}; there are {', '.join(IMPLS)}")
    place, out = place_of(device), args.out or results_file("prefill", device)
    options = options_for(cases, args.step_tokens)
    readers = {impl: reader(impl, open_random(args.model, device), options) for impl in impls}
    for case in cases:
        rows = measure(case, readers, device, args.iterations, place)
        for row in rows:
            print(case.name, row["impl"], row["metric"], row["p50"], flush=True)
        write_rows(out, rows)


if __name__ == "__main__":
    main()
