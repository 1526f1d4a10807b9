"""Time to the first token of a question about a JPEG, from the file to the token on the host (needs a CUDA GPU).

    python benchmarks/bench_ttft.py                                     # -> benchmarks/results/ttft.csv
    python benchmarks/bench_ttft.py --model random:Qwen/Qwen3-VL-2B-Instruct:3 --device cpu --pictures 2

Case ``img448``: one 448 x 448 JPEG (196 visual tokens) and some 20 tokens of text, one question at a time, no picture
seen before, no cache of features. Metric ``ms``: reading, decoding, the processor, tower, prompt, the token. Random
weights at the true sizes.

    ours_w4, ours_bf16   LLM on the engine
    transformers_bf16    Transformers' processor and generate(max_new_tokens=1)
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_decode import open_random, quantized, wait
from PIL import Image
from record import place_of, results_file, row_of, write_rows

from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.models.load import LoadedModel

QUESTION = "what is to the left of the large red circle, and how many of them are there in the picture?"
WARMUP = 4


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEG files like photographs in size: a small random picture, enlarged."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8))
        path = folder / f"{number}.jpg"
        small.resize((448, 448), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


def measure_ours(llm: LLM, paths: list[Path]) -> list[float]:
    params, found = SamplingParams(max_tokens=1, ignore_eos=True), []
    for path in paths:
        started = time.perf_counter()
        llm.generate(QUESTION, path, params)
        found.append(1000 * (time.perf_counter() - started))
    return found


def measure_transformers(loaded: LoadedModel, paths: list[Path]) -> list[float]:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    found = []
    for path in paths:
        started = time.perf_counter()
        messages = [{"role": "user", "content": content}]
        text = loaded.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = loaded.processor(text=[text], images=[Image.open(path).convert("RGB")], return_tensors="pt")
        device = next(loaded.model.parameters()).device
        loaded.model.generate(**inputs.to(device), max_new_tokens=1, do_sample=False).tolist()
        wait(device)
        found.append(1000 * (time.perf_counter() - started))
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="random:Qwen/Qwen3-VL-2B-Instruct")
    made.add_argument("--impls", default="ours_w4,ours_bf16,transformers_bf16")
    made.add_argument("--pictures", type=int, default=20)
    made.add_argument("--device", default="cuda")
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    device = torch.device(args.device)
    place, out = place_of(device), args.out or results_file("ttft", device)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), args.pictures + WARMUP)
        for impl in args.impls.split(","):
            loaded = open_random(args.model, device)
            if impl.startswith("ours"):
                codes = quantized(loaded.model) if impl == "ours_w4" else {}
                samples = measure_ours(LLM(loaded, options=EngineOptions(picture_bytes=0), quantized=codes), paths)
                del codes
            else:
                samples = measure_transformers(loaded, paths)
            row = row_of("ttft", "img448", impl, "ms", samples[WARMUP:], "ms", place)
            print("img448", impl, "ms", row["p50"], flush=True)
            write_rows(out, [row])
            del loaded
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
