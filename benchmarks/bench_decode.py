"""Decoding with the engine: tokens a second in W4 and BF16, beside Transformers' compiled static cache (needs a GPU).

    python benchmarks/bench_decode.py                                   # -> benchmarks/results/decode.csv, memory.csv
    python benchmarks/bench_decode.py --cases b1_c512,b64_c512 --impls ours_w4 --tokens 128
    python benchmarks/bench_decode.py --model random:Qwen/Qwen3-VL-2B-Instruct:2 --device cpu --cases b2_c32 --tokens 8

Case ``b16_c512``: 16 requests with a prompt of 512 tokens each. Greedy, no end token. Metric ``tok_s``: tokens of all
requests from when each has its first until one has its last; ``step_ms``: of single steps. Random weights at the true
sizes. The head and the cache are BF16, unless the name says otherwise.

    ours_w4                     linears of the decoder on W4G128 (rounded to nearest), engine/
    ours_bf16                   the same engine on BF16 weights
    ours_w4_fp8_cache, ours_w4_int8_head, ours_w4_int8_head_fp8_cache
                                W4 with EngineOptions(kv_cache="fp8"), int8_head=True, both; only where --impls asks
    ours_w4_batch_invariant     W4 with batch_invariant=True: what it costs; only where --impls asks
    transformers_bf16_static    Transformers: static cache, torch.compile(mode="reduce-overhead") of one token's forward

``memory.csv``: ``weights_gb``, what the model takes on the GPU with its tower, cases ``all`` and ``decoder`` (linears,
embeddings, head).
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import GB, Row, place_of, results_file, row_of, write_rows

from grace_vlm.engine.cache import PAGE_TOKENS, pages_for
from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.engine.request import Prompt
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.random_start import build_random_model, random_config
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_processor
from grace_vlm.quant.affine import quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

CASES = "b1_c512,b16_c512,b64_c512,b1_c8192"
IMPLS = ("ours_w4", "ours_bf16", "transformers_bf16_static")
OPTIONS: dict[str, dict[str, Any]] = {
    "ours_w4_fp8_cache": {"kv_cache": "fp8"},
    "ours_w4_int8_head": {"int8_head": True},
    "ours_w4_int8_head_fp8_cache": {"kv_cache": "fp8", "int8_head": True},
    "ours_w4_batch_invariant": {"batch_invariant": True},
}
"""Of an engine, by impl; none for the others."""
TEXTS = ["what shape is in the picture?", "is there a red circle?", "a blue triangle", "yes", "no"]


def open_random(name: str, device: torch.device) -> LoadedModel:
    """A model of true size with random weights and a toy's tokenizer."""
    config = random_config(name)
    processor = build_toy_processor(TEXTS, max_pixels=448 * 448)
    model = build_random_model(config, processor.tokenizer, device, seed=0)
    return LoadedModel(model, processor, adapter_for(config.model_type), name)


def quantized(model: Any, bits: int = 4) -> dict[str, QuantizedTensor]:
    """Every linear of the decoder's layers, rounded to nearest in groups of 128."""
    scheme = QuantScheme(bits, 128)
    found = {}
    for name, module in model.model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().float()
            found[f"model.language_model.layers.{name}"] = quantize_tensor(weight, minmax_scale(weight, scheme), scheme)
    return found


def prompts(count: int, length: int, words: int) -> Iterator[Prompt]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        positions = np.tile(np.arange(length, dtype=np.int64), (3, 1))
        yield Prompt(rng.integers(0, min(words, 1000), length), positions, np.zeros(0, dtype=np.int64))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_engine(engine: Engine, count: int, length: int, num_tokens: int) -> tuple[float, list[float]]:
    """(tokens a second, milliseconds of each step) from when every request has its first token until one has its last:
    all rows run."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts(count, length, engine.weights.embeddings.num_words)):
        engine.add(f"{number}", prompt, params)
    first: set[str] = set()
    while len(first) < count:
        first |= {event.request_id for event in engine.step() if event.choice}
    wait(engine.weights.device)
    started, tokens, steps = time.perf_counter(), 0, []
    before = started
    has_ended = False
    while not has_ended:
        events = engine.step()
        has_ended = any(event.finish for event in events)
        tokens += sum(event.choice is not None for event in events)
        now = time.perf_counter()
        steps.append(1000 * (now - before))
        before = now
    for number in range(count):
        engine.cancel(f"{number}")
    return tokens / (before - started), steps


def measure_transformers(
    loaded: LoadedModel, count: int, length: int, num_tokens: int, compiled: bool = True
) -> tuple[float, list[float]]:
    """The same of Transformers' own model: a prompt at once, then a compiled forward a token."""
    from transformers import StaticCache

    model, device = loaded.model, next(loaded.model.parameters()).device
    words = model.config.get_text_config().vocab_size
    ids = torch.from_numpy(np.stack([p.ids for p in prompts(count, length, words)])).to(device)
    torch._dynamo.reset()  # a case is compiled for its own number of rows
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + num_tokens + 8)

    def forward(token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        position = place.view(1, 1, 1).expand(3, count, 1)
        states = model.model.language_model(
            inputs_embeds=model.model.language_model.embed_tokens(token), position_ids=position, past_key_values=cache,
            cache_position=place, use_cache=True,
        )  # fmt: skip
        return model.lm_head(states.last_hidden_state[:, -1]).argmax(-1, keepdim=True)

    step = torch.compile(forward, mode="reduce-overhead", dynamic=False) if compiled else forward
    with torch.inference_mode():
        positions = torch.arange(length, device=device)
        states = model.model.language_model(
            inputs_embeds=model.model.language_model.embed_tokens(ids), cache_position=positions, use_cache=True,
            position_ids=positions.view(1, 1, -1).expand(3, count, -1), past_key_values=cache,
        )  # fmt: skip
        token = model.lm_head(states.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
        steps: list[float] = []
        warm = 5
        for number in range(num_tokens - 1):
            before = time.perf_counter()
            token = step(token.clone(), torch.tensor([length + number], device=device))
            wait(device)
            if number >= warm:
                steps.append(1000 * (time.perf_counter() - before))
    return 1000 * count * len(steps) / sum(steps), steps


def memory_rows(name: str, loaded: LoadedModel, engine: Engine, place: Row) -> list[Row]:
    """What tower, projector and decoder take; what the decoder shares with the model counts once."""
    ends = (engine.weights.embeddings.weight, engine.weights.head.linear.weight)
    shared = {weight.data_ptr() for weight in ends if isinstance(weight, torch.Tensor)}
    rest = sum({p.data_ptr(): p.nbytes for p in loaded.model.parameters() if p.data_ptr() not in shared}.values())
    sizes = {"all": rest + engine.weights.num_bytes, "decoder": engine.weights.num_bytes}
    return [row_of("memory", case, name, "weights_gb", [size / GB], "GB", place) for case, size in sizes.items()]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="random:Qwen/Qwen3-VL-2B-Instruct")
    made.add_argument("--cases", default=CASES, help="bROWS_cTOKENS with commas")
    made.add_argument("--impls", default=",".join(IMPLS))
    made.add_argument("--tokens", type=int, default=256, help="of each answer")
    made.add_argument(
        "--repeats", type=int, default=3, help="of a case; the first, which records graphs, is not counted"
    )
    made.add_argument("--device", default="cuda")
    made.add_argument("--out", type=Path, help="CSV whose rows are replaced; memory.csv stands beside it")
    args = made.parse_args()
    device = torch.device(args.device)
    found = [re.fullmatch(r"b(\d+)_c(\d+)", case) for case in args.cases.split(",")]
    if not all(found):
        made.error("--cases has a word that is no bROWS_cTOKENS, for example b16_c512")
    cases = [(match[0], int(match[1]), int(match[2])) for match in found if match]
    if unknown := set(args.impls.split(",")) - {*IMPLS, *OPTIONS}:
        made.error(f"--impls has {', '.join(sorted(unknown))}; there are {', '.join((*IMPLS, *OPTIONS))}")
    place, out = place_of(device), args.out or results_file("decode", device)
    for impl in args.impls.split(","):
        loaded = open_random(args.model, device)
        engine = None
        if impl.startswith("ours"):
            most = max(count * pages_for(length + args.tokens) for _, count, length in cases) * PAGE_TOKENS
            codes = quantized(loaded.model) if impl.startswith("ours_w4") else {}
            at_once = max(count for _, count, _ in cases)
            options = EngineOptions(cache_tokens=most, max_running=at_once, **OPTIONS.get(impl, {}))
            engine = Engine(loaded, codes, options)
            del codes
            if device.type == "cuda":  # on a CPU all weights are FP32
                memory = out.with_name(out.name.replace("decode", "memory") if "decode" in out.name else "memory.csv")
                write_rows(memory, memory_rows(impl, loaded, engine, place))
        for case, count, length in cases:
            speeds, steps = [], []
            for repeat in range(args.repeats + 1):
                if engine is not None:
                    speed, times = measure_engine(engine, count, length, args.tokens)
                else:
                    speed, times = measure_transformers(loaded, count, length, args.tokens)
                if repeat:
                    speeds.append(speed)
                    steps += times
            rows = [
                row_of("decode", case, impl, "tok_s", speeds, "1/s", place),
                row_of("decode", case, impl, "step_ms", steps, "ms", place),
            ]
            print(case, impl, *(f"{row['metric']} {row['p50']}" for row in rows), flush=True)
            write_rows(out, rows)
        del loaded, engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
