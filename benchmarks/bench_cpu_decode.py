"""A token on a CPU: our engine beside llama.cpp, on the same weights of 4 bits.

    python benchmarks/bench_cpu_decode.py               # -> benchmarks/results/cpu_decode.csv
    python benchmarks/bench_cpu_decode.py --layers 4,5 --context 64 --tokens 16 --rounds 3

The decoder of ``--model`` (Qwen3-VL-2B's shapes, random weights rounded to nearest in groups of 128) with two numbers
of layers, more than three: llama.cpp opens no Qwen3-VL of as few layers as pictures enter. Greedy, one request, no end
token; case ``l4_c128``: four layers, a prompt of 128 tokens.

    ours         engine/, EngineOptions(int8_head=True)
    llama_cpp    llama.cpp's server in this process (the xllamacpp wheel) on the GGUF that ``grace pack`` writes of the
                 same codes: Q4_0, which is 32 weights a scale, four of them equal, and which it repacks when it opens
                 them

Metric ``tok_s``: tokens a second. The vocabulary is another one there: our head is INT8, the file's BF16, twice the
bytes, so ``tok_s`` of few layers says more about heads than about layers. Case ``body_c128``, metric ``body_ms``, is
without it: milliseconds of a token with the many layers less those with the few, over the difference of layers, times
the layers of the whole model. What does not depend on the number of layers (head, embeddings, sampling, HTTP) falls
out. One sample a round.

Turns as in bench_cpu_linear.py: in rounds, each when all threads of this process sleep, after a request that is not
counted. The column ``driver`` has llama.cpp's version and the vector instructions that it was compiled for; a wheel is
compiled for AVX2, ours for the processor that it runs on. xllamacpp is no dependency of grace-vlm.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cpu_linear import busy_seconds, processor, wait_until_still
from bench_decode import measure_engine, open_random, prompts, quantized
from bench_loss import Parser, numbers_in, say
from bench_w4linear import names_in
from record import RESULTS, Row, place_of, read_rows, row_of, write_rows

from grace_vlm.engine.cache import PAGE_TOKENS, pages_for
from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.formats.pack import pack
from grace_vlm.formats.publish import publish_model
from grace_vlm.kernels.cpu import why_not
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.random_start import random_config
from grace_vlm.quant.scheme import QuantizedTensor

MODEL = "random:Qwen/Qwen3-VL-2B-Instruct"
LAYERS = (4, 8)
IMPLS = ("ours", "llama_cpp")

Turn = Callable[[], float]
"""Answers one request and returns milliseconds a token."""


def write_gguf(loaded: LoadedModel, codes: dict[str, QuantizedTensor], folder: Path) -> Path:
    """model.gguf of the very codes that our engine runs."""
    published = publish_model(folder / "model", loaded.model, loaded.processor, codes, (), "random weights\n")
    return pack(published, folder / "gguf", "gguf") / "model.gguf"


def serve(path: Path, room_tokens: int, num_threads: int) -> Any:
    """llama.cpp's server on a file; its text alone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.ui = room_tokens, 1, True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    params.cache_prompt, params.cache_ram_mib = False, 0
    return xllamacpp.Server(params)


def llama_turn(server: Any, context: int, num_tokens: int, words: int) -> Turn:
    """One request to a server; the time is the server's own, of the tokens after the first."""
    (prompt,) = prompts(1, context, words)
    request = {
        "prompt": prompt.ids.tolist(),
        "n_predict": num_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "cache_prompt": False,
    }
    request |= {"samplers": ["top_k"], "top_k": 1}

    def turn() -> float:
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.listening_address + "/completion", json.dumps(request).encode(), headers)
        with urllib.request.urlopen(call, timeout=600) as reply:
            timings = json.load(reply)["timings"]
        if timings["prompt_n"] != context or timings["predicted_n"] != num_tokens:
            raise ValueError(f"llama.cpp read {timings['prompt_n']} tokens and made {timings['predicted_n']}")
        # Its clock starts with the first token.
        return float(timings["predicted_ms"]) / (num_tokens - 1)

    return turn


def our_turn(engine: Engine, context: int, num_tokens: int) -> Turn:
    return lambda: 1000 / measure_engine(engine, 1, context, num_tokens)[0]


def open_turns(args: argparse.Namespace, num_layers: int, folder: Path) -> dict[str, Turn]:
    """Both programs on one model of so many layers."""
    loaded = open_random(f"{args.model}:{num_layers}", torch.device("cpu"))
    words = loaded.model.config.get_text_config().vocab_size
    codes = quantized(loaded.model)
    turns: dict[str, Turn] = {}
    if "llama_cpp" in args.impls:
        path = write_gguf(loaded, codes, folder)
        room = args.context + args.tokens + 64
        turns["llama_cpp"] = llama_turn(serve(path, room, args.threads), args.context, args.tokens, words)
    if "ours" in args.impls:
        tokens = pages_for(args.context + args.tokens) * PAGE_TOKENS
        engine = Engine(loaded, codes, EngineOptions(cache_tokens=tokens, max_running=1, int8_head=True))
        turns["ours"] = our_turn(engine, args.context, args.tokens)
    return turns


def timed_rounds(turns: dict[tuple[str, int], Turn], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Milliseconds a token by (impl, layers), one sample a round; the first round is not counted."""
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in turns}
    for number in range(rounds + 1):
        for key, turn in turns.items():
            wait_until_still()
            ms = turn()
            if number:
                samples[key].append(ms)
    return samples


def body_ms(few: Sequence[float], many: Sequence[float], layers: tuple[int, int], all_layers: int) -> list[float]:
    """Of a token in all layers, from pairs of a round."""
    return [all_layers * (high - low) / (layers[1] - layers[0]) for low, high in zip(few, many, strict=True)]


def rows_of(args: argparse.Namespace, samples: dict[tuple[str, int], list[float]], place: Row) -> list[Row]:
    few, many = args.layers
    all_layers = random_config(args.model).text_config.num_hidden_layers
    rows = []
    for impl in args.impls:
        where = {**place, "driver": llama_version() if impl == "llama_cpp" else ""}
        for layers in args.layers:
            speeds = [1000 / ms for ms in samples[impl, layers]]
            rows.append(row_of("cpu_decode", f"l{layers}_c{args.context}", impl, "tok_s", speeds, "1/s", where))
        body = body_ms(samples[impl, few], samples[impl, many], (few, many), all_layers)
        rows.append(row_of("cpu_decode", f"body_c{args.context}", impl, "body_ms", body, "ms", where))
    return rows


def llama_version() -> str:
    import xllamacpp

    said = str(xllamacpp.get_system_info()).replace("CPU :", "").split("|")
    words = [one.partition("=")[0].strip() for one in said if one.strip().endswith("= 1")]
    return f"xllamacpp {importlib.metadata.version('xllamacpp')} {' '.join(words)}"


def parser() -> Parser:
    made = Parser(prog="bench_cpu_decode.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=MODEL, help="random:ID; default: %(default)s")
    made.add_argument("--layers", help=f"few,many; default: {','.join(map(str, LAYERS))}")
    made.add_argument("--impls", default=",".join(IMPLS), help="default: %(default)s")
    made.add_argument("--context", type=int, default=128, help="tokens of the prompt; default: %(default)s")
    made.add_argument("--tokens", type=int, default=48, help="of an answer; default: %(default)s")
    made.add_argument("--rounds", type=int, default=9, help="counted ones; default: %(default)s")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's, the cores")
    made.add_argument("--out", type=Path, default=RESULTS / "cpu_decode.csv", help="CSV whose rows are replaced")
    return made


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(argv)
    args.layers = tuple(numbers_in(made, "--layers", args.layers, LAYERS, ""))
    if len(args.layers) != 2 or not 3 < args.layers[0] < args.layers[1]:
        made.error("--layers takes two numbers above 3, the smaller one first, for example 4,8")
    if min(args.context, args.rounds, args.threads) < 1 or args.tokens < 2:
        made.error("--context, --rounds and --threads must be at least 1, --tokens 2")
    args.impls = names_in(made, args.impls, IMPLS)
    if "ours" in args.impls and (reason := why_not()):
        made.error(f"ours cannot run here: {reason}")
    if "llama_cpp" in args.impls and importlib.util.find_spec("xllamacpp") is None:
        say("llama_cpp: xllamacpp not installed, so it has no rows")
        args.impls.remove("llama_cpp")
    try:
        if args.out.exists():
            read_rows(args.out)
    except (OSError, ValueError) as error:
        made.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = settings(argv)
    torch.set_num_threads(args.threads)
    place = {**place_of(torch.device("cpu")), "device": processor(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        turns = {}
        for layers in args.layers:
            for impl, turn in open_turns(args, layers, Path(folder) / f"{layers}").items():
                turns[impl, layers] = turn
        before, started = busy_seconds(), time.perf_counter()
        samples = timed_rounds(turns, args.rounds)
        others = (busy_seconds() - before) / (time.perf_counter() - started) / args.threads
    rows = rows_of(args, samples, place)
    for row in rows:
        print(f"{row['case']}: {row['impl']} {row['metric']} {float(row['p50']):.4g}", flush=True)
    print(f"other programs took {others:.0%} of {args.threads} cores")
    write_rows(args.out, rows)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
