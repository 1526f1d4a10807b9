"""Mixed load on the engine: how long people wait, and how much is answered, at several rates of arrival (needs a GPU).

    python benchmarks/bench_load.py                                     # -> benchmarks/results/load.csv
    python benchmarks/bench_load.py --rates 4,16,all --requests 400 --impls ours_w4
    python benchmarks/bench_load.py --model random:Qwen/Qwen3-VL-2B-Instruct:2 --device cpu --requests 6 --rates 1,all

Case ``rate8``: requests arrive by a Poisson process, 8 a second on average; ``all``: all at once. They are the same in
every case, of a fixed seed: prompts of 16 to 2,048 words and answers of 8 to 256 tokens, logarithms uniform; a third
begins with a 448 x 448 picture, all of them different and none kept. Greedy, no end token, so answers have the length
that was asked. The engine's own loop of steps on random weights at the true sizes, no HTTP.

Of one run, over all requests, in milliseconds:

    first_token_p50_ms, _p95_, _p99_       from the request's arrival, as it was drawn, to its first token
    between_tokens_p50_ms, _p95_, _p99_    between two tokens of one request
    tok_s                                  answers' tokens from the first arrival to the last token, a second
    pages_left                             of the cache, that nobody gave back at the end; anything but 0 is an error

A row's samples are runs, ``--repeats`` of them: p20, p50 and p80 of ``first_token_p95_ms`` say how a run's 95th
percentile of the wait differs from run to run. Impls run in turns; both are in memory at once.

    ours_w4, ours_bf16   engine/ with linears of the decoder on W4G128, and on BF16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from bench_decode import open_random, quantized
from bench_ttft import write_pictures
from record import Row, place_of, results_file, row_of, write_rows

from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.request import Prompt
from grace_vlm.engine.sampling import SamplingParams

IMPLS = ("ours_w4", "ours_bf16")
RATES = "2,8,32,all"
PROMPT_TOKENS, ANSWER_TOKENS = (16, 2_048), (8, 256)
PERCENTILES = (50, 95, 99)
QUESTION = "what shape is in the picture?"


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes, in seconds from the start."""

    seconds: float
    prompt: Prompt
    params: SamplingParams


@dataclass
class Waits:
    """Of one run: milliseconds to each first token and between tokens, tokens of answers, and how long it took."""

    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0
    pages_left: int = 0

    def metrics(self) -> dict[str, tuple[float, str]]:
        """Value and unit of each metric."""
        found = {}
        for name, samples in (("first_token", self.first_token), ("between_tokens", self.between_tokens)):
            for percent in PERCENTILES:
                found[f"{name}_p{percent}_ms"] = (float(np.percentile(samples, percent)), "ms")
        return {**found, "tok_s": (self.num_tokens / self.seconds, "1/s"), "pages_left": (self.pages_left, "pages")}


def lengthened(prompt: Prompt, ids: np.ndarray) -> Prompt:
    """A prompt with so many text tokens more."""
    first = int(prompt.positions.max(initial=-1)) + 1
    rest = np.tile(np.arange(first, first + len(ids), dtype=np.int64), (3, 1))
    positions = np.concatenate([prompt.positions, rest], axis=1)
    return Prompt(np.concatenate([prompt.ids, ids]), positions, prompt.visual, prompt.images)


def requests(
    llm: LLM,
    pictures: Sequence[Path],
    count: int,
    prompt_tokens: tuple[int, int] = PROMPT_TOKENS,
    answer_tokens: tuple[int, int] = ANSWER_TOKENS,
) -> list[tuple[Prompt, SamplingParams]]:
    """So many requests, always the same; every third shows the next of ``pictures``."""
    rng, words = np.random.default_rng(0), min(1000, llm.engine.weights.embeddings.num_words)
    nothing = Prompt(np.zeros(0, np.int64), np.zeros((3, 0), np.int64), np.zeros(0, np.int64))
    shown, found = iter(pictures), []

    def drawn(low: int, high: int) -> int:
        return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))

    for number in range(count):
        start = llm.prompt(QUESTION, [next(shown)]) if number % 3 == 0 else nothing
        prompt = lengthened(start, rng.integers(0, words, drawn(*prompt_tokens)))
        found.append((prompt, SamplingParams(max_tokens=drawn(*answer_tokens), ignore_eos=True)))
    return found


def arrivals(asked: Sequence[tuple[Prompt, SamplingParams]], rate: float | None) -> list[Arrival]:
    """Requests in order, at ``rate`` a second; None: all at once. A faster rate is the same process in less time."""
    gaps = np.random.default_rng(1).exponential(size=len(asked))
    seconds = np.zeros(len(asked)) if rate is None else np.cumsum(gaps) / rate
    return [Arrival(float(at), *one) for at, one in zip(seconds, asked, strict=True)]


def measure(engine: Engine, coming: Sequence[Arrival]) -> Waits:
    """Step the engine while requests come, until all have ended.

    A request that comes during a step waits for its end, which counts: the wait is from when it came.
    """
    waits, last = Waits(), dict[str, float]()
    started, num_added = time.perf_counter(), 0
    now = 0.0
    while num_added < len(coming) or engine.has_work:
        now = time.perf_counter() - started
        while num_added < len(coming) and coming[num_added].seconds <= now:
            engine.add(f"{num_added}", coming[num_added].prompt, coming[num_added].params)
            num_added += 1
        if not engine.has_work:
            time.sleep(coming[num_added].seconds - now)
            continue
        events = engine.step()
        now = time.perf_counter() - started
        for event in events:
            if event.choice is None:
                continue
            before = last.get(event.request_id)
            if before is None:
                waits.first_token.append(1000 * (now - coming[int(event.request_id)].seconds))
            else:
                waits.between_tokens.append(1000 * (now - before))
            last[event.request_id] = now
            waits.num_tokens += 1
    waits.seconds = now - coming[0].seconds
    waits.pages_left = engine.pages.num_pages - engine.pages.num_free
    assert waits.pages_left == 0, f"{waits.pages_left} pages were not given back"
    return waits


def rows_of(case: str, impl: str, runs: Sequence[Waits], place: Row) -> list[Row]:
    """Rows of one case and impl; a run is a sample."""
    found = [run.metrics() for run in runs]
    return [
        row_of("load", case, impl, metric, [metrics[metric][0] for metrics in found], unit, place)
        for metric, (_, unit) in found[0].items()
    ]


def rates_of(text: str) -> dict[str, float | None] | None:
    """Cases by name of rates with commas, ``all`` among them; None if a word is no rate."""
    found: dict[str, float | None] = {}
    for word in text.split(","):
        try:
            rate = None if word == "all" else float(word)
        except ValueError:
            return None
        if rate is not None and not 0 < rate < float("inf"):
            return None
        found["all" if rate is None else f"rate{word}"] = rate
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="random:Qwen/Qwen3-VL-2B-Instruct")
    made.add_argument("--rates", default=RATES, help="requests a second, with commas; all: at once")
    made.add_argument("--requests", type=int, default=200, help="of a run")
    made.add_argument("--impls", default=",".join(IMPLS))
    made.add_argument("--cache-tokens", type=int, default=65_536, help="of the engine")
    made.add_argument("--max-running", type=int, default=64, help="requests at a time")
    made.add_argument("--repeats", type=int, default=3, help="runs of a case")
    made.add_argument("--device", default="cuda")
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    device, rates, impls = torch.device(args.device), rates_of(args.rates), args.impls.split(",")
    if rates is None:
        made.error("--rates has a word that is no rate; expected numbers above 0 or all, for example 4,16,all")
    if unknown := [impl for impl in impls if impl not in IMPLS]:
        made.error(f"--impls has {unknown[0]!r}; there are {', '.join(IMPLS)}")
    place, out = place_of(device), args.out or results_file("load", device)
    options = EngineOptions(args.cache_tokens, args.max_running, picture_bytes=0)
    llms = {}
    for impl in impls:
        loaded = open_random(args.model, device)
        codes = quantized(loaded.model) if impl == "ours_w4" else {}
        llms[impl] = LLM(loaded, options=options, quantized=codes)
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder), -(-args.requests // 3))
        asked = requests(llms[impls[0]], pictures, args.requests)
    for llm in llms.values():
        # Not counted: as requests end, it runs every number of rows, and records a graph of each.
        measure(llm.engine, arrivals(asked, None))
    for case, rate in rates.items():
        runs: dict[str, list[Waits]] = {impl: [] for impl in impls}
        for _ in range(args.repeats):
            for impl, llm in llms.items():
                runs[impl].append(measure(llm.engine, arrivals(asked, rate)))
        for impl in impls:
            rows = rows_of(case, impl, runs[impl], place)
            print(case, impl, *(f"{row['metric']} {row['p50']}" for row in rows), flush=True)
            write_rows(out, rows)


if __name__ == "__main__":
    main()
