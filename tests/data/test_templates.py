"""For every family, 200 rows become the ids that Transformers' own ``apply_chat_template`` makes, token by token."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import patchify_of
from grace_vlm.data.rows import Row, Turn
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

TEXT = (
    "what shape colour is the cat's hat? Answer: (a) red, (b) blue; 3.14 1,000 naïve Ångström 漢字 ねこ 고양이 🙂 "
    "def f(x):\n  return\tx**2 <b>bold</b> $x_1$ [0.12, 0.5] https://a.b/c?d=e&f — «ё» assistant user USER: ASSISTANT: "
    "double  space end."
)
WORDS = [word for word in TEXT.split(" ") if word.strip()]
# What llava-hf publishes: pictures first, and nothing after an answer but a space.
LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def conversations(num_rows: int) -> list[tuple[list[str], int]]:
    """(texts of the turns, number of pictures): one to four exchanges, none to three pictures anywhere in questions."""
    rng = random.Random(7)
    made = []
    for _ in range(num_rows):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() for _ in range(2 * rng.randint(1, 4))]
        num_images = rng.choice((0, 1, 1, 1, 2, 3))
        for _ in range(num_images):
            turn = 2 * rng.randrange(len(texts) // 2)
            words = texts[turn].split(" ")
            words.insert(rng.randint(0, len(words)), "<image>")
            texts[turn] = " ".join(words)
        made.append((texts, num_images))
    return made


def messages(texts: list[str]) -> list[dict[str, Any]]:
    """What a person would hand to ``apply_chat_template``."""
    out = []
    for number, text in enumerate(texts):
        content: list[dict[str, str]] = []
        for at, part in enumerate(text.split("<image>")):
            content += [{"type": "image"}] * (at > 0)
            content += [{"type": "text", "text": part.strip()}] * bool(part.strip())
        out.append({"role": ("user", "assistant")[number % 2], "content": content})
    return out


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "qwen2_5_vl", "llava", "llava-hf"])
def test_200_rows_token_by_token(family: str) -> None:
    size = {"qwen3_vl": "tiny", "llava-hf": "llava"}.get(family, family)
    processor = build_toy_processor(WORDS * 3, size=size)
    if family == "llava-hf":
        processor.chat_template = LLAVA_HF_TEMPLATE
    config = build_toy_model(size, processor).config
    adapter = adapter_for(config.model_type)
    encoder = Encoder(processor, adapter, config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (140, 160, 3), dtype=np.uint8))
    grid = patchify_of(adapter, config, processor)([image])[0][0]
    num_differing = 0
    for number, (texts, num_images) in enumerate(conversations(200)):
        turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
        row = Row(number, str(number), ("a.png",) * num_images, turns)
        rendered = processor.apply_chat_template(messages(texts), tokenize=False)
        images = [image] * num_images or None
        stock = processor(text=[rendered], images=images, return_tensors="np")["input_ids"][0].tolist()
        sample = encoder.encode(row, [grid] * num_images)
        if family == "llava-hf":
            # The one difference there is: an end in the place of the space, or no model would learn to stop.
            assert processor.tokenizer.decode(stock[-1:]).strip() == ""
            stock[-1] = processor.tokenizer.eos_token_id
        assert sample.input_ids.tolist() == stock, texts
        num_differing += len(set(stock)) > 10
        answers = texts[1::2]
        closing = processor.tokenizer.decode(sample.labels[sample.labels >= 0][-1:].tolist())
        assert closing in ("<|im_end|>", "</s>")
        runs = _runs(sample.labels)
        assert len(runs) == len(answers)
        for run, answer in zip(runs, answers, strict=True):
            decoded = processor.tokenizer.decode(run, skip_special_tokens=True)
            assert decoded.strip() == answer.strip()
        prompt = encoder.prompt(row, [grid] * num_images)
        opened = processor.apply_chat_template(messages(texts)[:-1], tokenize=False, add_generation_prompt=True)
        assert prompt.input_ids.tolist() == processor(text=[opened], images=images)["input_ids"][0]
    assert num_differing > 150, "the rows must exercise the tokenizer"


def _runs(labels: np.ndarray) -> list[list[int]]:
    runs: list[list[int]] = []
    before = False
    for label in labels.tolist():
        if label >= 0:
            if not before:
                runs.append([])
            runs[-1].append(label)
        before = label >= 0
    return runs
