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

_ROWS = 256
"""Of logits at a time."""
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
    (FP64 models: FP64)."""
    losses, divergences, agreed = [], [], 0
    for number, ids in enumerate(windows):
        hidden = _states(model, ids)
        other = None if reference is None else _states(reference, ids)
        loss = divergence = 0.0
        for start in range(0, len(ids) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(ids) - 1))
            words = _log_probabilities(model, hidden[rows])
            gold = ids[rows.start + 1 : rows.stop + 1].to(words.device).unsqueeze(1)
            loss -= float(words.gather(1, gold).double().sum())
            if reference is not None and other is not None:
                theirs = _log_probabilities(reference, other[rows])[:, : words.shape[1]].to(words.device)
                divergence += float((theirs.exp() * (theirs - words[:, : theirs.shape[1]])).double().sum())
                agreed += int((theirs.argmax(1) == words.argmax(1)).sum())
        losses.append(loss / (len(ids) - 1))
        if reference is not None:
            divergences.append(divergence / (len(ids) - 1))
        progress(number + 1, len(windows))
    count = sum(len(ids) - 1 for ids in windows)
    return TextScore(count, tuple(losses), tuple(divergences), agreed / count if reference is not None else None)


def _states(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """(S, D) after the final norm, of a text without pictures."""
    device = loaded.adapter.head(loaded.model).weight.device
    states: torch.Tensor = loaded.model.model(input_ids=ids.unsqueeze(0).to(device), use_cache=False).last_hidden_state[
        0
    ]
    return states


def _log_probabilities(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """In FP32 from BF16 states and a BF16 head too: logits that are rounded to BF16 move a KL by 1e-4 nats."""
    head = loaded.adapter.head(loaded.model)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    return functional.linear(hidden.to(dtype), head.weight.to(dtype), bias).log_softmax(-1)
