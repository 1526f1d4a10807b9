"""Keys and values of all running requests, in pages that requests own.

A request takes the pages for its whole life, prompt and longest answer, before its first token runs. So it never has
to wait in the middle for a page that another one holds, nothing is ever computed twice, and a request that could not
fit into an empty cache is known at once.
"""

from __future__ import annotations

import torch

PAGE_TOKENS = 16
"""Tokens of a page."""


class Pages:
    """Which pages are free."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many pages, or None and nothing taken."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        """Pages that were taken, back; the list is empty after, so that none is given twice."""
        self._free.extend(reversed(pages))
        pages.clear()
        assert len(self._free) <= self.num_pages


def pages_for(num_tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class KeyValueCache:
    """Keys and values, (layers, pages * PAGE_TOKENS, kv_heads, head_dim) each: a token's place is its slot.

    Args:
        dtype: the model's, or E4M3, a byte a number (``kernels/cache_rows.py``).
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        shape = (num_layers, num_pages * PAGE_TOKENS, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def page_bytes(self) -> int:
        """Of a page, keys and values of all layers."""
        return (self.keys.nbytes + self.values.nbytes) // self.num_pages


def slots_of(pages: list[int], first: int, count: int) -> list[int]:
    """Where tokens ``first`` to ``first + count`` of a request that owns ``pages`` lie."""
    return [pages[t // PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS for t in range(first, first + count)]
