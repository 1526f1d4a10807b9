"""Student and teacher must speak of the same tokens; the first that differs is named."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from grace_vlm.errors import ConfigError
from grace_vlm.models.tokenizers import require_same_tokens, token_fingerprint
from grace_vlm.models.toy import build_qwen_tokenizer

TEXTS = ["what is it?", "a red circle", "a blue square", "yes", "no"] * 4


def message(student: object, teacher: object) -> str:
    with pytest.raises(ConfigError) as caught:
        require_same_tokens(student, teacher)
    return str(caught.value)


def test_equal_tokenizers_pass_whatever_their_heads() -> None:
    require_same_tokens(build_qwen_tokenizer(TEXTS), build_qwen_tokenizer(TEXTS))
    larger = build_qwen_tokenizer(TEXTS)
    larger.add_tokens([AddedToken("<|extra|>", special=True, normalized=False)])
    require_same_tokens(build_qwen_tokenizer(TEXTS), larger)


def test_the_first_differing_token_is_named() -> None:
    student, teacher = build_qwen_tokenizer(TEXTS), build_qwen_tokenizer(["dogs and cats", "trees"] * 4)
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    first = next(w for w, i in sorted(ours.items(), key=lambda item: item[1]) if theirs.get(w) != i)
    other = f"id {theirs[first]}" if first in theirs else "unknown"
    assert message(student, teacher) == (
        f"student and teacher tokenizers differ: {first!r} is id {ours[first]} for the student and {other} "
        "for the teacher; use a teacher of the same family"
    )


def test_a_token_that_the_teacher_lacks_is_named() -> None:
    student = build_qwen_tokenizer(TEXTS)
    student.add_tokens([AddedToken("<|extra|>", special=True, normalized=False)])
    number = student.convert_tokens_to_ids("<|extra|>")
    assert message(student, build_qwen_tokenizer(TEXTS)) == (
        f"student and teacher tokenizers differ: '<|extra|>' is id {number} for the student and unknown "
        "for the teacher; use a teacher of the same family"
    )


def test_equal_words_that_merge_otherwise_are_found_by_the_probes() -> None:
    student, teacher = build_qwen_tokenizer(TEXTS), build_qwen_tokenizer(TEXTS)
    teacher.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    found = message(student, teacher)
    assert found.startswith("student and teacher tokenizers differ: token 0 of 'What is shown in the picture? Answer ")
    assert found.endswith("for the teacher; use a teacher of the same family")
    assert "is 'W' for the student and " in found


def test_a_fingerprint_is_of_words_ids_and_merges() -> None:
    one = token_fingerprint(build_qwen_tokenizer(TEXTS))
    assert one == token_fingerprint(build_qwen_tokenizer(TEXTS))
    assert one != token_fingerprint(build_qwen_tokenizer(["dogs and cats", "trees"] * 4))
    lower = build_qwen_tokenizer(TEXTS)
    lower.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    assert one != token_fingerprint(lower)
