"""Tensors by value: when two are equal, and a digest that is the same for equal ones.

By value means: -0.0 is +0.0, every NaN is the same NaN, and a floating dtype is no difference if the values are the
same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from grace_vlm.errors import printable

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same: which tensor, where in it, what each side has."""

    tensor: str
    index: tuple[int, ...] | None
    a: str
    b: str

    def __str__(self) -> str:
        where = f"[{', '.join(map(str, self.index))}]" if self.index is not None else ""
        return printable(f"{self.tensor}{where}: {self.a} in A, {self.b} in B")


def compare_values(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference | None:
    """The first place where two tensors differ in value; None if nowhere."""
    if a.shape != b.shape:
        return Difference(name, None, f"shape {tuple(a.shape)}", f"shape {tuple(b.shape)}")
    if a.dtype == b.dtype and torch.equal(a, b):
        return None
    differs = (a != b) & ~((a != a) & (b != b))
    if not bool(differs.any()):
        return None
    index = tuple(int(i) for i in differs.nonzero()[0])
    return Difference(name, index, str(a[index].item()), str(b[index].item()))


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.detach().contiguous().reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.numel(), _CHUNK))


def _canonical_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The narrowest of BF16, FP32, FP64 that holds every value; integers stay what they are."""
    if not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
        return tensor.dtype
    for narrow in (torch.bfloat16, torch.float32):
        if all(compare_values("", chunk, chunk.to(narrow).to(chunk.dtype)) is None for chunk in _chunks(tensor)):
            return narrow
    return torch.float64


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and values: little-endian, row-major, in the narrowest dtype that holds them."""
    dtype = _canonical_dtype(tensor)
    found = hashlib.sha256(f"{dtype} {tuple(tensor.shape)}\n".encode())
    for chunk in _chunks(tensor):
        values = chunk.to(dtype)
        if dtype.is_floating_point:
            values = values + 0.0  # -0.0 + 0.0 is +0.0
            # The largest of values with a NaN among them is NaN, and costs one pass.
            if bool(values.amax().isnan()):
                values = torch.where(values.isnan(), torch.nan, values)
        found.update(values.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
