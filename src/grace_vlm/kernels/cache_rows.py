"""Keys and values as a cache keeps them: in the model's dtype, or a byte each.

The byte is E4M3 (``torch.float8_e4m3fn``): 4 significand bits from 2^-6 to 448, multiples of 2^-9 below. What is larger
is kept as +-448; the cast alone would make a NaN of it. There is no scale. In a floating-point format one of a power of
two moves the ends of the range and rounds nothing otherwise, and what was measured lies inside: keys of the shipped
toys reach 9 and their values 26, between 0.4 and 2 % of them are below 2^-6, and the relative error of a layer, 0.026,
is that of a layer scaled by its own maximum. A model whose keys pass 448 (some with biases on k may) loses what is
above, and its cache is better left in the model's dtype.

Here are the references; ``cache_rows_triton.py`` rounds alike on a GPU. Old torch operators do not know the type, so
rows are moved as bytes.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""That E4M3 has."""


def as_kept(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in the dtype of a cache, to the nearest, half to even; in E4M3 between -448 and 448. NaN stays."""
    return x.clamp(-LARGEST, LARGEST).to(dtype) if dtype == FP8 else x.to(dtype)


def put_rows(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Keep x (n, KV, D) in ``slots`` (n,) int64 of a cache (slots, KV, D)."""
    _plain(cache).index_copy_(0, slots, _plain(as_kept(x, cache.dtype)))


def read_rows(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, KV, D) of ``slots`` (n,) int64, in ``dtype``, which holds all that is kept exactly."""
    return _plain(cache).index_select(0, slots).view(cache.dtype).to(dtype)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that every operator takes."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
