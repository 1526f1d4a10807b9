"""Tensors that are known by name, dtype and shape before they are read: what lets a conversion stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class TensorSpec(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Lazy(Mapping[str, T], Generic[T]):
    """A read-only mapping with known names whose values are loaded at each access.

    Args:
        names: in order.
        load: the value of a name.
        spec: dtype and shape of a name's tensor without loading it, where that is known.
    """

    def __init__(
        self, names: Iterable[str], load: Callable[[str], T], spec: Callable[[str], TensorSpec] | None = None
    ) -> None:
        self._names, self._load, self._spec = dict.fromkeys(names), load, spec

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape; loads the tensor if nobody said them."""
        return self._spec(name) if self._spec else _spec_of_tensor(self[name])


def _spec_of_tensor(tensor: object) -> TensorSpec:
    assert isinstance(tensor, torch.Tensor)
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def spec_of(tensors: Mapping[str, torch.Tensor], name: str) -> TensorSpec:
    """Dtype and shape of ``tensors[name]``, without loading it if the mapping knows them."""
    known = getattr(tensors, "spec", None)
    return known(name) if known else _spec_of_tensor(tensors[name])


def ahead(values: Mapping[str, T], names: Iterable[str] | None = None) -> Iterator[tuple[str, T]]:
    """(name, value) of a mapping in order, the next value being loaded while the caller works on this one.

    Loading is reading and tensor arithmetic, writing and hashing are neither, and all four leave the interpreter lock
    alone: two cores then work. Two values are in memory at a time.
    """
    order = list(values if names is None else names)
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = [pool.submit(values.__getitem__, name) for name in order[:1]]
        for number, name in enumerate(order):
            value = coming.pop().result()
            if number + 1 < len(order):
                coming.append(pool.submit(values.__getitem__, order[number + 1]))
            yield name, value
            del value


def joined(*mappings: Mapping[str, torch.Tensor]) -> Lazy[torch.Tensor]:
    """Several mappings, whose names are distinct, as one."""
    owner = {name: mapping for mapping in mappings for name in mapping}
    return Lazy(owner, lambda name: owner[name][name], lambda name: spec_of(owner[name], name))
