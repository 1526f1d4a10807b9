"""What a model has left of the language: perplexity of a text, and how far its words are from another model's.

    grace perplexity MODEL TEXT --reference BF16_MODEL

A vision-language model that was trained and quantized on short answers may still answer them when its language is
gone; plain text shows it. Every token but the first of each window is predicted from those before it in the window.
Windows do not overlap and are the units of the intervals: tokens of one window are no independent draws.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from grace_vlm.engine.prompt_file import read_text
from grace_vlm.errors import DataError
from grace_vlm.evals.student_t import t_interval
from grace_vlm.models.load import LoadedModel

_ROWS = 256
"""Of logits at a time."""
_TOKENS = 8192
"""Of the windows that a GPU is given together; a CPU has one window at a time."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TextScore:
    """Means over windows of equal length, nats a token.

    Args:
        losses: cross-entropy of each window. divergences: KL(reference || model) of each, empty without a reference.
        agreement: share of the positions where both have the same likeliest word; None without a reference.
    """

    num_tokens: int
    losses: tuple[float, ...]
    divergences: tuple[float, ...]
    agreement: float | None

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy."""
        return math.exp(self.loss)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the perplexity, by Student's t over windows; with one window (nan, nan)."""
        low, high = t_interval(self.losses)
        return math.exp(low), math.exp(high)

    @property
    def divergence(self) -> float | None:
        return statistics.mean(self.divergences) if self.divergences else None


def read_windows(path: Path, tokenizer: Any, window_tokens: int, limit: int | None = None) -> list[torch.Tensor]:
    """(window_tokens,) ids of each whole window of a UTF-8 text, from its start; ``limit`` of them at most.

    Raises:
        DataError: no such text, or one that is shorter than a window.
    """
    ids = torch.tensor(tokenizer(read_text(path), add_special_tokens=False)["input_ids"], dtype=torch.int64)
    count = len(ids) // window_tokens
    if not count:
        raise DataError(f"{path} has {len(ids):,} tokens and a window {window_tokens:,}; expected one window at least")
    kept = count if limit is None else min(count, limit)
    return list(ids[: kept * window_tokens].view(kept, window_tokens))


@torch.inference_mode()
def score_text(
    model: LoadedModel,
    windows: Sequence[torch.Tensor],
    reference: LoadedModel | None = None,
    progress: Progress = lambda done, total: None,
) -> TextScore:
    """Cross-entropy of each window, and KL(reference || model) in nats, from FP32 logits of the model's own states
    (FP64 models: FP64).

    Args:
        windows: one at least, of one length.
    """
    asked = _Asked.of(model)
    other = None if reference is None else _Asked.of(reference)
    size = _windows_together(asked.head.device, len(windows[0]))
    found: list[list[float]] = []
    for start in range(0, len(windows), size):
        ids = torch.stack(list(windows[start : start + size])).to(asked.head.device)
        found += _score(asked, ids, other).tolist()
        progress(len(found), len(windows))
    count = sum(len(ids) - 1 for ids in windows)
    losses = tuple(-row[0] for row in found)
    if other is None:
        return TextScore(count, losses, (), None)
    return TextScore(count, losses, tuple(row[1] for row in found), sum(int(row[2]) for row in found) / count)


def _windows_together(device: torch.device, window_tokens: int) -> int:
    return max(1, _TOKENS // window_tokens) if device.type == "cuda" else 1


@dataclass(frozen=True)
class _Asked:
    """A model and its head (V, D) in FP32, from BF16 too: logits that are rounded to BF16 move a KL by 1e-4 nats."""

    loaded: LoadedModel
    head: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, loaded: LoadedModel) -> _Asked:
        head = loaded.adapter.head(loaded.model)
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        return cls(loaded, head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))

    def predicting(self, ids: torch.Tensor) -> torch.Tensor:
        """(B (S - 1), D) after the final norm, of windows without pictures: the states that predict a word."""
        out = self.loaded.model.model(input_ids=ids.to(self.head.device), use_cache=False).last_hidden_state
        states: torch.Tensor = out[:, :-1].flatten(0, 1)
        return states

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden.to(self.head.dtype), self.head, self.bias).log_softmax(-1)


def _score(model: _Asked, ids: torch.Tensor, reference: _Asked | None) -> torch.Tensor:
    """(B, 3) FP64: of each window its mean log-likelihood, its mean divergence and how many likeliest words agree; the
    host reads nothing before all is asked for."""
    hidden = model.predicting(ids)
    other = None if reference is None else reference.predicting(ids)
    gold = ids[:, 1:].flatten().unsqueeze(1)
    rows: list[torch.Tensor] = []
    for start in range(0, len(gold), _ROWS):
        part = slice(start, start + _ROWS)
        words = model.log_probabilities(hidden[part])
        found = [words.gather(1, gold[part]).squeeze(1)]
        if reference is not None and other is not None:
            theirs = reference.log_probabilities(other[part])[:, : words.shape[1]].to(words.device)
            found.append((theirs.exp() * (theirs - words[:, : theirs.shape[1]])).sum(1, dtype=torch.float64))
            found.append(theirs.argmax(1) == words.argmax(1))
        rows.append(torch.stack([value.double() for value in found], dim=1))
    values = torch.cat(rows).unflatten(0, (len(ids), -1))
    return torch.cat([values[:, :, :2].mean(dim=1), values[:, :, 2:].sum(dim=1)], dim=1)
