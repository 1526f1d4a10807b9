"""Is the teacher wrong where it is unsure, and what does the gate make of that? (GRACE section 3.1, eq. 1-2)

At every supervised token of the rows, with the text before it as it stands: the entropy H of the teacher's next word
at T = 1, whether its likeliest word is not the one that stands there, and the gate exp(-H / log V). Two populations:
``all`` supervised tokens, which the loss weighs, and the ``first`` token of each answer: one a question, and where
answers are a word or a letter the nearest to "is the answer right". Tokens that close an answer are certain and right
nearly always; they make ``all`` look better correlated than the choice of words is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from grace_vlm.data.collate import Batch
from grace_vlm.data.encode import IGNORE_INDEX
from grace_vlm.evals.charts import quantile_bins
from grace_vlm.evals.why.fit import equal_width_bins, line_of_bins, pearson
from grace_vlm.evals.why.vocabulary import entropy_and_error
from grace_vlm.losses.gdkd import gate_of_entropy

NUM_BINS = 10
NUM_GATE_BINS = 32
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Certainty:
    """Collects tokens batch by batch: a dozen bytes each.

    Args:
        num_words: rows of the teacher's head, V of the gate.
    """

    def __init__(self, num_words: int) -> None:
        self.num_words, self._num_rows = num_words, 0
        self._entropy: list[torch.Tensor] = []
        self._wrong: list[torch.Tensor] = []
        self._first: list[torch.Tensor] = []
        self._row: list[torch.Tensor] = []

    def add(self, batch: Batch, hidden: torch.Tensor, head: torch.Tensor) -> None:
        """
        Args:
            batch: packed, on the host. hidden: (n_supervised, d_t) of the teacher. head: (V, d_t).
        """
        entropy, wrong = entropy_and_error(hidden, head, batch.targets.to(hidden.device))
        self._entropy.append(entropy.cpu())
        self._wrong.append(wrong.cpu())
        # The state before an answer's first token is a question's, which has no label itself.
        self._first.append(batch.labels.flatten()[batch.supervised] == IGNORE_INDEX)
        assert batch.segments is not None
        ends = torch.tensor(batch.segments).cumsum(0)
        self._row.append(self._num_rows + torch.searchsorted(ends, batch.supervised, right=True))
        self._num_rows += len(batch.segments)

    def summary(self) -> dict[str, Any]:
        """``entropy`` (by population) and ``gate`` of the result."""
        entropy, wrong, first, row = (
            torch.cat(parts) if parts else torch.empty(0)
            for parts in (self._entropy, self._wrong, self._first, self._row)
        )
        first = first.bool()
        found = {
            name: error_by_entropy(entropy[chosen].tolist(), wrong[chosen].int().tolist(), row[chosen].int().tolist())
            for name, chosen in (("all", torch.ones_like(first)), ("first", first))
        }
        return {"entropy": found, "gate": gates(entropy, wrong.bool(), self.num_words)}


def error_by_entropy(entropy: Sequence[float], wrong: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
    """Correlation, bins of equal counts and of equal widths, and the line through each.

    Args:
        entropy: nats, a token each. wrong: 1 where the likeliest word is not the right one. rows: which row it is of.
    """
    points = list(zip(entropy, wrong, strict=True))
    kinds = {
        "equal_counts": quantile_bins(points, NUM_BINS) if points else [],
        "equal_widths": equal_width_bins(points, NUM_BINS),
    }
    return {
        "num_tokens": len(entropy),
        "num_rows": len(set(rows)),
        "error_rate": sum(wrong) / len(wrong) if wrong else None,
        "pearson": asdict(pearson(entropy, wrong, rows)),
        **{
            name: {"bins": [asdict(b) for b in bins], "line": asdict(line_of_bins(bins))}
            for name, bins in kinds.items()
        },
    }


def gates(entropy: torch.Tensor, wrong: torch.Tensor, num_words: int) -> dict[str, Any]:
    """How the gate is distributed over [1/e, 1]: counts of equal bins, mean, quantiles, and the mean of right and wrong
    tokens apart.

    Args:
        entropy: (n,) nats. wrong: (n,) bool.
    """
    gate = gate_of_entropy(entropy.double(), num_words).numpy()
    low = float(np.exp(-1.0))
    counts, edges = np.histogram(np.clip(gate, low, 1.0), bins=NUM_GATE_BINS, range=(low, 1.0))
    is_wrong = wrong.numpy()

    def mean(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) else None

    return {
        "num_words": num_words,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "mean": mean(gate),
        "mean_right": mean(gate[~is_wrong]),
        "mean_wrong": mean(gate[is_wrong]),
        "quantiles": {str(q): float(np.quantile(gate, q)) for q in QUANTILES} if len(gate) else {},
    }
