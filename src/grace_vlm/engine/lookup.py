"""What may follow a text, looked up in the text itself.

Where the last tokens stood before, what followed them there may follow again: answers quote their prompts, and lists,
code and tables repeat themselves.

    the red circle and the blue square are left of the red    "the red" stood before: a draft of 4 tokens is
                                                              "circle and the blue"

The last three tokens are looked for and then the last two; of several places the last one counts. A draft that reaches
the end of the text goes on with itself, so one of ``a b a b a`` is ``b a b a ...``.
"""

from __future__ import annotations

from collections.abc import Iterable

SIZES = (3, 2)
"""Tokens that are looked for, the longest first."""


class Lookup:
    """A text that grows, with where each few tokens of it stood last: a draft costs the same however long it is."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        """By tokens: the place behind them. The text's own end has none."""
        self.extend(tokens)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """So many tokens more at its end."""
        known = self._tokens
        for token in tokens:
            for size in SIZES:
                if len(known) >= size:
                    self._next[tuple(known[-size:])] = len(known)
            known.append(token)

    def draft(self, count: int) -> list[int]:
        """``count`` tokens that may follow, or none."""
        known = self._tokens
        for size in SIZES:
            place = self._next.get(tuple(known[-size:]))
            if place is not None:
                period = len(known) - place
                return [known[place + number % period] for number in range(count)]
        return []
