"""A tiny real Qwen3-VL, quantized by a few lines of torch, as model folders; and random questions for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from grace_vlm.formats.folder import write_grid
from grace_vlm.models.toy import build_toy_model, build_toy_processor
from grace_vlm.quant import QuantizedTensor, bake, parse_scheme, quantize_tensor

TEXTS = ["what shape is in the picture?", "is there a red circle?", "a blue triangle", "yes", "no"]
QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SchemeOf = Callable[[str], str]


def build_tiny(seed: int = 0) -> tuple[Any, Any]:
    """(model, processor): hidden 128, two layers, a tower of two; FP32."""
    processor = build_toy_processor(TEXTS * 4, vocab_size=384)
    return build_toy_model("tiny", processor, seed=seed), processor


def quantize_linears(
    model: Any, scheme_of: SchemeOf, rounding: str = "bf16"
) -> tuple[dict[str, QuantizedTensor], tuple[str, ...]]:
    """({module: tensor on its grid}, names left in BF16), min-max scales."""
    quantized, bf16 = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        scheme = parse_scheme(scheme_of(name), rounding) if name.rpartition(".")[2] in QUANTIZED else None
        if scheme is None:
            bf16.append(name)
            continue
        weight = module.weight.detach()
        groups = weight.reshape(weight.shape[0], -1, scheme.group_size)
        quantized[name] = quantize_tensor(weight, groups.abs().amax(-1) / scheme.qmax, scheme)
    return quantized, tuple(bf16)


def write_model_folder(
    folder: Path, model: Any, processor: Any, scheme_of: SchemeOf, rounding: str = "bf16"
) -> dict[str, QuantizedTensor]:
    """Write a model folder with a grid (no manifest) and return what is on the grid."""
    quantized, bf16 = quantize_linears(model, scheme_of, rounding)
    state = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}
    state.update({f"{name}.weight": bake(tensor) for name, tensor in quantized.items()})
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("a tiny model\n")
    if quantized:
        write_grid(folder, quantized, bf16)
    return quantized


def random_questions(processor: Any, num: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs: random words, and a random picture of 128 x 128 to 192 x 128 in two of three."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(num):
        length = int(torch.randint(4, 24, (1,), generator=generator))
        words = processor.tokenizer.decode(torch.randint(0, 256, (length,), generator=generator).tolist())
        content: list[dict[str, Any]] = [{"type": "text", "text": words}]
        pictures = []
        if index % 3:
            width = 128 + 32 * int(torch.randint(0, 3, (1,), generator=generator))
            pictures = [torch.randint(0, 256, (3, 128, width), generator=generator, dtype=torch.uint8)]
            content.insert(0, {"type": "image"})
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        yield dict(processor(text=[text], images=pictures or None, return_tensors="pt"))


def save_questions(path: Path, questions: Iterator[dict[str, torch.Tensor]]) -> int:
    """Write inputs as ``<index>.<name>`` tensors of one safetensors file; returns how many."""
    tensors, count = {}, 0
    for count, inputs in enumerate(questions, start=1):
        tensors.update({f"{count - 1}.{name}": tensor.contiguous() for name, tensor in inputs.items()})
    save_file(tensors, path)
    return count


def copy_of(folder: Path, target: Path) -> Path:
    """A copy to damage, without its manifest."""
    shutil.copytree(folder, target)
    for name in ("manifest.json", "manifest.sha256"):
        (target / name).unlink(missing_ok=True)
    return target


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Load, change in place, write."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Load, change in place, write."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
