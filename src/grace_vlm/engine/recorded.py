"""Forwards that a GPU has recorded: whole prompts and pictures, one launch each instead of many hundred.

A prompt of a few hundred tokens and a picture are computed faster than a host can ask for their operations one by one,
and the first token waits for both. A recording is of one size. A prompt is laid into the next larger one
(``room_for``): behind its tokens are rows of nobody, which no token sees and whose keys and values go to the cache's
last page. A picture's size is its grid. A size is recorded when it comes the second time; the one that was used longest
ago is forgotten. Without a GPU the same functions run as they are, which is how they are tested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from grace_vlm.engine.cache import PAGE_TOKENS, KeyValueCache
from grace_vlm.engine.forward import Span, Step, forward
from grace_vlm.engine.layers import Weights
from grace_vlm.engine.request import Features
from grace_vlm.models.adapter import Grid
from grace_vlm.models.decoder import borders_of, has_varlen

MAX_SIZES = 16
"""Of prompts, and of pictures. A recording of a 2B model takes some ten megabytes."""
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Recorded(Generic[Result]):
    """A function of memory that stays where it is, called again: by one launch on a GPU."""

    def __init__(self, device: torch.device, pool: object, function: Callable[[], Result]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            # Kernels are compiled and libraries take their workspaces on a first call.
            function()
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, pool=pool):  # type: ignore[arg-type]
                self._result = function()

    def __call__(self) -> Result:
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


class Sizes(Generic[Key, Result]):
    """What is recorded by size; None for one that comes the first time, or that cannot be."""

    def __init__(self) -> None:
        self._found: OrderedDict[Key, Result | None] = OrderedDict()
        self._refused: set[Key] = set()

    def of(self, key: Key, record: Callable[[], Result]) -> Result | None:
        """What ``record`` made of the key."""
        if key in self._refused:
            return None
        if key not in self._found:
            self._found[key] = None
        elif self._found[key] is None:
            try:
                self._found[key] = record()
            except RuntimeError:  # a stock tower may do what no recording can hold, like waiting for the GPU
                self._refused.add(key)
                del self._found[key]
                return None
        self._found.move_to_end(key)
        if len(self._found) > MAX_SIZES:
            self._found.popitem(last=False)
        return self._found[key]


def room_for(num_tokens: int) -> int:
    """To an eighth of the next power of two, and a multiple of 16."""
    step = max(16, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    return -(-num_tokens // step) * step


class _Prompt:
    """A forward over a whole prompt of up to ``size`` tokens, with ``num_deepstack`` DeepStack layers."""

    def __init__(self, weights: Weights, cache: KeyValueCache, size: int, num_deepstack: int, pool: object) -> None:
        device, dtype = weights.device, weights.dtype
        self._nobody = (cache.num_pages - 1) * PAGE_TOKENS + torch.arange(size, device=device) % PAGE_TOKENS
        self._slots = self._nobody.clone()
        self._embeds = torch.zeros(size, weights.width, dtype=dtype, device=device)
        self._positions = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._deepstack = [torch.zeros_like(self._embeds) for _ in range(num_deepstack)]
        self._wanted = torch.zeros(1, dtype=torch.int64, device=device)
        borders = borders_of([size], device) if has_varlen(self._embeds) else None
        self._step = Step(
            embeds=self._embeds,
            positions=self._positions,
            slots=self._slots,
            spans=[Span(size, size)],
            context=self._slots,
            borders=None if borders is None else (borders, borders),
            visual=torch.arange(size, device=device),
            deepstack=self._deepstack,
            wanted=self._wanted,
        )
        self._run = Recorded(device, pool, lambda: forward(weights, cache, self._step))

    def __call__(self, step: Step) -> torch.Tensor:
        """(1, d) of the step's last token."""
        count = len(step.embeds)
        self._embeds[:count] = step.embeds
        self._positions[:, :count] = step.positions
        self._slots.copy_(self._nobody)
        self._slots[:count] = step.slots
        self._wanted.copy_(step.wanted)
        for own, given in zip(self._deepstack, step.deepstack, strict=True):
            own.zero_()
            own.index_copy_(0, step.visual, given.to(own.dtype))
        return self._run()


class RecordedPrompts:
    """``forward`` for steps of one whole prompt.

    Args:
        most: tokens of the longest that is recorded.
    """

    def __init__(self, weights: Weights, cache: KeyValueCache, most: int) -> None:
        self.weights, self.cache, self.most = weights, cache, most
        self._pool = pool_of(weights.device)
        self._sizes = Sizes[tuple[int, int], _Prompt]()

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor | None:
        """(1, d) as ``forward`` has it, valid until the next call; None for other steps, and a size's first."""
        spans, count = step.spans, len(step.embeds)
        if len(spans) != 1 or spans[0].count != spans[0].length or len(step.wanted) != 1 or count > self.most:
            return None
        key = (room_for(count), len(step.deepstack))
        prompt = self._sizes.of(key, lambda: _Prompt(self.weights, self.cache, *key, self._pool))
        return None if prompt is None else prompt(step)


class _Picture:
    """Features of pictures of one grid."""

    def __init__(self, like: torch.Tensor, pool: object, make: Callable[[torch.Tensor], Features]) -> None:
        self._pixels = torch.empty_like(like)
        self._pixels.copy_(like)
        self._run = Recorded(like.device, pool, lambda: make(self._pixels))

    def __call__(self, pixels: torch.Tensor) -> Features:
        self._pixels.copy_(pixels)
        return self._run().clone()


class RecordedPictures:
    """Tower and merger, by grid.

    Args:
        make: features of (pixels on the device, grid).
    """

    def __init__(self, device: torch.device, make: Callable[[torch.Tensor, Grid], Features]) -> None:
        self._make, self._pool = make, pool_of(device)
        self._sizes = Sizes[Grid, _Picture]()

    def __call__(self, pixels: torch.Tensor, grid: Grid) -> Features:
        """Of one picture; ``pixels`` are on the device."""
        picture = self._sizes.of(grid, lambda: _Picture(pixels, self._pool, lambda own: self._make(own, grid)))
        return self._make(pixels, grid) if picture is None else picture(pixels)


def pool_of(device: torch.device) -> object:
    """Memory that recordings of one kind share: one runs at a time, and what it leaves is copied or used at once."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
