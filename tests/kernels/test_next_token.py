"""The next input of a decode step in Triton (interpreted on a CPU) against torch."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.kernels import next_token, next_token_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def state(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.full((count,), 9, dtype=torch.int64, device=DEVICE)
    positions = torch.arange(count, device=DEVICE)
    return ids, positions, torch.arange(count, dtype=torch.int32, device=DEVICE) + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "words"), [(1, 5), (3, 1024), (2, 5000), (4, 40_001)])
def test_triton_is_torch(monkeypatch: pytest.MonkeyPatch, count: int, words: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(next_token, "runs_triton", lambda *_: False)
    logits = torch.randn(count, words + 16, generator=torch.Generator().manual_seed(words)).to(DEVICE, dtype)
    logits[:, words:] = 100  # behind the last word is nobody's
    ours, right = state(count), state(count)
    next_token_triton.advance(logits[:, :words], *ours)
    next_token.advance(logits[:, :words], *right)
    for found, expected in zip(ours, right, strict=True):
        assert torch.equal(found, expected)


def test_of_equals_the_first_is_taken() -> None:
    logits = torch.zeros(3, 70_000, device=DEVICE)
    logits[0, [69_999, 40_000, 1_500]] = 7.0
    logits[1, [5, 6, 60_000]] = 1.0
    ids, positions, lengths = state(3)
    next_token_triton.advance(logits, ids, positions, lengths)
    assert ids.tolist() == [1_500, 5, 0]


def test_numbers_that_cannot_be_compared_are_passed_over() -> None:
    """What comes out is a word, whatever the logits are."""
    logits = torch.full((3, 3_000), float("nan"), device=DEVICE)
    logits[0, 1_234], logits[1] = 1.0, float("-inf")
    ids, positions, lengths = state(3)
    next_token_triton.advance(logits, ids, positions, lengths)
    assert ids[0] == 1_234
    assert 0 <= int(ids.min()) <= int(ids.max()) < 3_000
