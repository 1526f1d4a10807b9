"""Questions for other programs as files: prompts as text, pictures as PNG of sizes that no processor changes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SIZES = {
    "Qwen3-VL": [(128, 128), (160, 128), (192, 160)],
    "Qwen2-VL": [(140, 140), (168, 140), (140, 196)],
    "LLaVA-1.5": [(112, 112)],
    "SmolLM2": [(192, 192)],
}
"""Width and height in pixels, in multiples of a visual token. LLaVA's take squares only."""
WORDS = ("what shape is in the picture?", "is there a red circle?", "Ünïcode 12345", "it's   we'll", "a\n\nb", "yes")


def random_rows(family: str, folder: Path, num: int) -> list[tuple[str, Path | None]]:
    """(text, picture): noise for two in three, none for the others; one colour where llama.cpp resamples (LLaVA)."""
    chance, rows = random.Random(0), []
    noise = torch.Generator().manual_seed(0)
    for index in range(num):
        text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 3)))
        picture = None
        if index % 3:
            width, height = chance.choice(SIZES[family])
            size = (1, 1, 3) if family in ("LLaVA-1.5", "SmolLM2") else (height, width, 3)
            pixels = torch.randint(0, 256, size, generator=noise, dtype=torch.uint8).expand(height, width, 3)
            picture = folder / f"{family}-{index}.png"
            Image.fromarray(pixels.contiguous().numpy()).save(picture)
        rows.append((text, picture))
    return rows


def easy_vqa_rows(folder: Path, num: int) -> list[tuple[str, Path | None]]:
    """(question, picture) of easy-vqa's test split, enlarged to 128 x 128, each kind of question in turn."""
    from easy_vqa import get_test_image_paths, get_test_questions

    texts, _, pictures = get_test_questions()
    paths, rows = get_test_image_paths(), []
    for index in range(num):
        which = index * (len(texts) // num)
        picture = folder / f"easy-{index}.png"
        Image.open(paths[pictures[which]]).convert("RGB").resize((128, 128), Image.Resampling.NEAREST).save(picture)
        rows.append((texts[which], picture))
    return rows


def write_questions(path: Path, processor: Any, vocab_size: int, rows: Iterable[tuple[str, Path | None]]) -> Path:
    """What the scripts here read: prompts in the model's chat format, pictures, the size of the vocabulary."""
    questions = []
    for text, picture in rows:
        content = [*([{"type": "image"}] if picture else []), {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        questions.append({"prompt": prompt, "pictures": [str(picture)] if picture else []})
    # A token that is a whole character, for servers that give no answer in half ones.
    letter = processor.tokenizer.convert_tokens_to_ids("a")
    path.write_text(json.dumps({"vocab_size": vocab_size, "letter": letter, "questions": questions}), encoding="utf-8")
    return path


def read_questions(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["questions"]
    return found


def inputs_of(processor: Any, question: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of a question."""
    pictures = [Image.open(path) for path in question["pictures"]]
    return dict(processor(text=[question["prompt"]], images=pictures or None, return_tensors="pt"))


def as_vector(logprobs: dict[str, float], vocab_size: int) -> torch.Tensor:
    """Log-probabilities by token id, (vocab_size,) FP32; a token that is missing is an error."""
    assert len(logprobs) == vocab_size
    return torch.tensor([logprobs[str(index)] for index in range(vocab_size)])
