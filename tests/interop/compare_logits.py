"""Runs in an environment without grace: do a packed and a baked folder give the same logits in BF16?

    python compare_logits.py BAKED PACKED --questions FILE.jsonl [--images ROOT] [--limit N]
    python compare_logits.py BAKED PACKED --inputs FILE.safetensors

FILE.jsonl holds LLaVA rows (``image`` relative to ROOT, by default its own folder; ``conversations``); the first turn
is asked. FILE.safetensors holds ready inputs as ``<index>.<name>``. Prints one JSON line; exits 1 unless each
difference is 0.0 and the loader had nothing to complain about.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig

PACKAGES = ("torch", "torchvision", "transformers", "compressed-tensors", "accelerate", "safetensors")


def load(folder: str, problems: list[str], **options: object) -> torch.nn.Module:
    """The model, in BF16 unless ``dtype`` says otherwise; keys that did not fit are problems."""
    options = {"dtype": torch.bfloat16, **options}
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    problems += [f"{folder}: {kind} {sorted(map(str, keys))[:3]}" for kind, keys in info.items() if keys]
    return model.eval()


def stored_inputs(path: str, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs 0, 1, 2, ... of a safetensors file, at most ``limit``."""
    with safe_open(path, framework="pt") as stored:
        names = [name.split(".", 1) for name in stored.keys()]  # noqa: SIM118
        for index in range(min(limit, 1 + max(int(number) for number, _ in names))):
            yield {name: stored.get_tensor(f"{number}.{name}") for number, name in names if int(number) == index}


def asked(path: str, images: Path, processor: object, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of the first question of each row."""
    with open(path, encoding="utf-8") as lines:
        for _, line in zip(range(limit), (line for line in lines if line.strip()), strict=False):
            row = json.loads(line)
            text = row["conversations"][0]["value"].replace("<image>", "").strip()
            content = [{"type": "image"}] if row.get("image") else []
            message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
            prompt = processor.apply_chat_template([message], add_generation_prompt=True)
            pictures = [Image.open(images / row["image"]).convert("RGB")] if row.get("image") else None
            yield dict(processor(text=[prompt], images=pictures, return_tensors="pt"))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("baked")
    parser.add_argument("packed")
    parser.add_argument("--questions")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--inputs")
    parser.add_argument("--limit", type=int, default=200)
    options = parser.parse_args()

    problems: list[str] = []
    if importlib.util.find_spec("grace_vlm") is not None:
        problems.append("grace_vlm can be imported here: this environment proves nothing")
    groups = json.loads((Path(options.packed) / "config.json").read_text())["quantization_config"]["config_groups"]
    baked = load(options.baked, problems)
    packed = {"default": load(options.packed, problems)}
    if len(groups) == 1:  # Transformers 5.23 dequantizes every layer by the first group
        config = CompressedTensorsConfig(dequantize=True)
        packed["dequantize"] = load(options.packed, problems, quantization_config=config)
    if options.inputs:
        questions = stored_inputs(options.inputs, options.limit)
    else:
        processor = AutoProcessor.from_pretrained(options.packed)
        images = options.images or Path(options.questions).parent
        questions = asked(options.questions, images, processor, options.limit)

    num_questions = num_pictures = 0
    largest = dict.fromkeys(packed, 0.0)
    spread = 0.0
    with torch.inference_mode():
        for inputs in questions:
            inputs = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in inputs.items()}
            expected = baked(**inputs).logits.float()
            for mode, model in packed.items():
                difference = (model(**inputs).logits.float() - expected).abs().max().item()
                largest[mode] = max(largest[mode], difference) if difference == difference else float("inf")
            spread = max(spread, expected.std().item())
            num_questions += 1
            num_pictures += "pixel_values" in inputs
    if not spread > 0:
        problems.append("the logits are all equal: this model proves nothing")
    report = {
        "questions": num_questions,
        "with_picture": num_pictures,
        "max_abs_difference": largest,
        "largest_logit_std": spread,
        "problems": problems,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    print(json.dumps(report))
    return 0 if not problems and num_questions and not any(largest.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
