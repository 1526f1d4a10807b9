"""``next_token`` in Triton: two launches, the first over parts of the vocabulary, so that one row fills a GPU too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grace_vlm.kernels.early_triton import early, wait_for_earlier

BLOCK, PARTS = 1024, 32


@triton.jit
def _largest(logits, best, place, words, stride, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_earlier(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each = tl.cdiv(tl.cdiv(words, BLOCK), PARTS) * BLOCK
    column = tl.arange(0, BLOCK)
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = column + part * each
    for first in range(part * each, tl.minimum(part * each + each, words), BLOCK):
        own = tl.load(logits + row * stride + first + column, mask=first + column < words, other=float("-inf"))
        own = own.to(tl.float32)
        at = tl.where(own > value, first + column, at)
        value = tl.maximum(own, value)
    highest = tl.max(value, axis=0)
    tl.store(best + row * PARTS + part, highest)
    # Of equals the first; a part without a number that can be compared says its own beginning.
    tl.store(place + row * PARTS + part, tl.min(tl.where(value == highest, at, part * each + each - 1), axis=0))


@triton.jit
def _advance(best, place, ids, positions, lengths, words, PARTS: tl.constexpr, EARLY: tl.constexpr):
    wait_for_earlier(EARLY)
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    value, at = tl.load(best + row * PARTS + part), tl.load(place + row * PARTS + part)
    chosen = tl.min(tl.where(value == tl.max(value, axis=0), at, words - 1), axis=0)
    tl.store(ids + row, chosen.to(tl.int64))
    tl.store(positions + row, tl.load(positions + row) + 1)
    tl.store(lengths + row, tl.load(lengths + row) + 1)


def advance(logits: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> None:
    """As ``next_token.advance``."""
    rows, words = logits.shape
    best = torch.empty(rows, PARTS, dtype=torch.float32, device=logits.device)
    place = torch.empty(rows, PARTS, dtype=torch.int32, device=logits.device)
    more = early(logits)
    _largest[(rows, PARTS)](logits, best, place, words, logits.stride(0), PARTS=PARTS, BLOCK=BLOCK, **more)
    _advance[(rows,)](best, place, ids, positions, lengths, words, PARTS=PARTS, num_warps=1, **more)
