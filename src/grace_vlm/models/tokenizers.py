"""Whether a student and a teacher speak of the same tokens.

Distillation compares two distributions over ids, so an id must be the same word for both. Widths say nothing about it:
heads are padded (Qwen2-VL-2B has 151,936 rows and 7B 152,064 over one tokenizer), and different tokenizers may have
equal widths. So the words are compared, and then what the two make of texts that exercise merges and special tokens.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from grace_vlm.errors import ConfigError

PROBES = (
    "What is shown in the picture? Answer with the option's letter from the given choices directly.",
    "The cat (left) isn't 3.14159 m away;\tit's 1,000,000 µm — naïve façade, Ångström.\n\n  def f(x):\n    return x**2",
    "图片里有什么？这是一只猫。 この写真には何が写っていますか。 이 사진에는 무엇이 있습니까?",
    "Что изображено на картинке? ما الذي يظهر في الصورة؟ चित्र में क्या है? 🙂👩‍🚀🏳️‍🌈",
    "https://example.com/a_b?c=d&e=%20f <b>bold</b> $\\frac{a}{b}$ [[0.12, 0.50]]",
)


def require_same_tokens(student: Any, teacher: Any) -> None:
    """Nothing, if every token of the student's is the teacher's too and both encode the probes alike.

    Raises:
        ConfigError: names the first token that differs, with its id on both sides.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for word, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(word) != number:
            other = f"id {theirs[word]}" if word in theirs else "unknown"
            raise _differ(f"{word!r} is id {number} for the student and {other} for the teacher")
    specials = "".join(word for word in student.all_special_tokens if isinstance(word, str))
    for probe in (*PROBES, specials):
        left, right = (t(probe, add_special_tokens=False)["input_ids"] for t in (student, teacher))
        if left != right:
            at = next(
                (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
            )
            words = [
                t.convert_ids_to_tokens(ids[at]) if at < len(ids) else None
                for t, ids in ((student, left), (teacher, right))
            ]
            shown = probe if len(probe) <= 40 else f"{probe[:37]}..."
            raise _differ(f"token {at} of {shown!r} is {words[0]!r} for the student and {words[1]!r} for the teacher")


def token_fingerprint(tokenizer: Any) -> str:
    """sha256 of the words with their ids, and of the probes' ids: equal for tokenizers that encode alike."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    specials = sorted(word for word in tokenizer.all_special_tokens if isinstance(word, str))
    probes = [tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in (*PROBES, "".join(specials))]
    return hashlib.sha256(json.dumps([words, probes]).encode()).hexdigest()


def _differ(what: str) -> ConfigError:
    return ConfigError(f"student and teacher tokenizers differ: {what}; use a teacher of the same family")
