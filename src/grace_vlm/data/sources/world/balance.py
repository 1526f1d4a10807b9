"""What can be answered without looking: the figures that a mix states about itself."""

from __future__ import annotations

from collections import Counter, defaultdict

MIN_ROWS = 30
"""Kinds with fewer rows say nothing about balance."""


class Blind:
    """Counts of answers, and of right ones, by kind of question."""

    def __init__(self) -> None:
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self._of_text: dict[str, Counter[str]] = defaultdict(Counter)
        self._asked: list[tuple[str, str, str]] = []

    def learn(self, kind: str, text: str, answer: str) -> None:
        """A row of the training."""
        self.answers[kind][answer] += 1
        self._of_text[text][answer] += 1

    def be_asked(self, kind: str, text: str, answer: str) -> None:
        """A row of the test."""
        self._asked.append((kind, text, answer))

    def constant(self) -> dict[str, float]:
        """Kind -> share of its most frequent answer among its rows to train on."""
        return {
            kind: round(max(counts.values()) / counts.total(), 4)
            for kind, counts in sorted(self.answers.items())
            if counts.total() >= MIN_ROWS
        }

    def by_text(self) -> dict[str, float]:
        """Kind -> share of the test's rows that are right if each question is given the answer that it had most often
        in the training, and one that did not occur there its kind's."""
        right: dict[str, list[bool]] = defaultdict(list)
        for kind, text, answer in self._asked:
            seen = self._of_text.get(text) or self.answers.get(kind.removeprefix("unseen_")) or Counter()
            right[kind].append(bool(seen) and _most(seen) == answer)
        return {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(right.items()) if len(hits) >= MIN_ROWS}

    def whole(self) -> float:
        """``by_text`` over all rows of the test."""
        shares, counts = self.by_text(), Counter(kind for kind, *_ in self._asked)
        number = sum(counts[kind] for kind in shares)
        return round(sum(share * counts[kind] for kind, share in shares.items()) / number, 4) if number else 0.0


def _most(counts: Counter[str]) -> str:
    """Of answers that are equally frequent the first by name."""
    return min(counts, key=lambda answer: (-counts[answer], answer))
