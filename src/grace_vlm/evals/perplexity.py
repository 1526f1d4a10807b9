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

from grace_vlm.errors import DataError
from grace_vlm.evals.student_t import t_interval
from grace_vlm.models.load import LoadedModel

_ROWS, _ROWS_ON_GPU = 256, 1024
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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
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
        windows: of one length.
    """
    losses: list[float] = []
    divergences: list[float] = []
    agreed = 0
    device = model.adapter.head(model.model).weight.device
    size = max(1, _TOKENS // len(windows[0])) if device.type == "cuda" else 1
    for start in range(0, len(windows), size):
        ids = torch.stack(list(windows[start : start + size])).to(device)
        found = _score(model, ids, reference).tolist()
        losses += [-row[0] for row in found]
        if reference is not None:
            divergences += [row[1] for row in found]
            agreed += sum(int(row[2]) for row in found)
        progress(min(start + size, len(windows)), len(windows))
    count = sum(len(ids) - 1 for ids in windows)
    return TextScore(count, tuple(losses), tuple(divergences), agreed / count if reference is not None else None)


def _score(model: LoadedModel, ids: torch.Tensor, reference: LoadedModel | None) -> torch.Tensor:
    """(B, 3) FP64: of each window its mean log-likelihood, its mean divergence and how many likeliest words agree; the
    host reads nothing before all is asked for."""
    hidden = _predicting(model, ids)
    other = None if reference is None else _predicting(reference, ids)
    gold = ids[:, 1:].flatten().unsqueeze(1)
    rows: list[torch.Tensor] = []
    step = _ROWS if ids.device.type == "cpu" else _ROWS_ON_GPU
    for start in range(0, len(gold), step):
        words = _log_probabilities(model, hidden[start : start + step])
        found = [words.gather(1, gold[start : start + step]).squeeze(1)]
        if reference is not None and other is not None:
            theirs = _log_probabilities(reference, other[start : start + step])[:, : words.shape[1]].to(words.device)
            found.append((theirs.exp() * (theirs - words[:, : theirs.shape[1]])).sum(1, dtype=torch.float64))
            found.append(theirs.argmax(1) == words.argmax(1))
        rows.append(torch.stack([value.double() for value in found], dim=1))
    values = torch.cat(rows).unflatten(0, (len(ids), -1))
    return torch.cat([values[:, :, :2].mean(dim=1), values[:, :, 2:].sum(dim=1)], dim=1)


def _predicting(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """(B (S - 1), D) after the final norm, of windows without pictures: the states that predict a word."""
    device = loaded.adapter.head(loaded.model).weight.device
    states: torch.Tensor = loaded.model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1)


def _log_probabilities(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """In FP32 from BF16 states and a BF16 head too: logits that are rounded to BF16 move a KL by 1e-4 nats."""
    head = loaded.adapter.head(loaded.model)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    return functional.linear(hidden.to(dtype), head.weight.to(dtype), bias).log_softmax(-1)
