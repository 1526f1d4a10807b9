"""Toy models of every family with a sharp head, prompts with and without pictures, and what Transformers answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grace_vlm.models.load import LoadedModel, end_ids
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_a_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="exact in FP32; BF16 on a GPU has near-ties")
FAMILIES = ("tiny", "qwen2_vl", "qwen2_5_vl", "llava")
TEXTS = [
    "what shape is in the picture?", "is there a red circle?", "count the blue triangles, please", "yes", "no",
    "the quick brown fox jumps over the lazy dog", "how many are there to the left of the large green one?",
]  # fmt: skip


def loaded_toy(size: str, seed: int = 0) -> LoadedModel:
    """A random model whose answers are long and of many tokens: its head is drawn apart from its embeddings.

    Where tokens are compared with another program's, its seed is 1: the two best lie at least 6e-4 nats apart wherever
    ``asked`` leads a greedy answer. With seed 0 and Qwen2-VL they once lie 7e-7 apart, and another processor's FP32
    sums choose the other.
    """
    processor = build_toy_processor(TEXTS * 3, size=size)
    model: Any = build_toy_model(size, processor, seed)
    generator = torch.Generator().manual_seed(seed)
    head = adapter_for(model.config.model_type).head(model)
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=generator) / head.weight.shape[1] ** 0.5)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.eval().requires_grad_(False)
    if DEVICE.type == "cuda":
        model.to(DEVICE, torch.bfloat16)
    return LoadedModel(model, processor, adapter_for(model.config.model_type), f"toy:{size}")


def pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """PNG files of several sizes."""
    rng, paths = np.random.default_rng(seed), []
    for number in range(count):
        width, height = rng.integers(64, 220, 2)
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def asked(paths: list[Path], count: int, seed: int = 0) -> list[tuple[str, list[Path]]]:
    """(text, pictures) of so many prompts: a third without pictures, some with two."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        text = " ".join(rng.choices(TEXTS, k=rng.randint(1, 4)))
        own = rng.sample(paths, (0, 1, 1, 1, 2, 0)[number % 6])
        found.append((text, own))
    return found


def stock_tokens(loaded: LoadedModel, text: str, images: list[Path], max_new_tokens: int) -> list[int]:
    """Of Transformers' processor and ``generate``, without the closing token."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    rendered = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    opened = [Image.open(path).convert("RGB") for path in images]
    inputs = loaded.processor(text=[rendered], images=opened or None, return_tensors="pt").to(DEVICE)
    out = loaded.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best = torch.cat(out.logits).float().topk(2).values
    if DEVICE.type == "cpu":
        assert (best[:, 0] - best[:, 1]).min() > 2e-5, "a near tie: which token is right hangs on the processor"
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ends = end_ids(loaded)
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)
