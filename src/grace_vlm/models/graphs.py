"""Decoder layers as CUDA graphs: one launch forward and one backward instead of some three thousand.

A GPU computes a layer of 2,048 channels and 1,000 tokens faster than a host can ask for it, compiled or not, and hosts
differ by half among machines with the same GPU. A graph asks once. It is made for one shape, so packed rows are laid
into a slightly larger one (``room_for``): what is added is segments of zeros, of which nothing learns and which no
token sees. A shape gets its graph when it comes the second time; rare ones run as they are. Where torch is to repeat
itself bit for bit (``runtime.deterministic``) they are laid into the larger shape too: what a step computes must not
hang on which shapes came before it, or since a resume.

The backward pass is written down layer by layer, with autograd inside a layer only: gradients of weights go straight to
where they are summed (``Sums``), and a layer that keeps no activations is computed again right before it is needed.
Activations live in memory that all graphs of a GPU share, student's and teacher's, from a forward to its backward;
between the two no other forward may run. The loss, the towers and everything with a size that only the data knows stay
outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from grace_vlm.models.decoder import GRAPHS, has_varlen, segment_arguments

MAX_GRAPHS = 16
"""Of one model. Each holds some ten thousand launches, tens of megabytes of the GPU."""


class Sums(Protocol):
    """Where gradients of leaves are added up over the micro-batches of a step (``train.masters``)."""

    def are_empty(self) -> bool:
        """Whether nothing was added in this step: the first gradients then replace what is there."""
        ...

    def add(self, leaf: nn.Parameter, gradient: torch.Tensor) -> None: ...

    def mark_filled(self) -> None:
        """A replay has added; nothing of ``add`` ran."""
        ...


@dataclass(frozen=True)
class Shape:
    """What a graph is for. ``tokens``, ``segments``: exactly so many; ``longest``: no segment is longer.

    Args:
        tap: the layer whose input is wanted. recompute: so many of the first layers keep no activations.
        deepstack: so many of the first layers are followed by an addition.
        is_first: its backward replaces the sums of gradients instead of adding; None without a backward.
    """

    tokens: int
    segments: int
    longest: int
    tap: int | None
    recompute: int
    deepstack: int
    is_first: bool | None


def _rounded_up(value: int, smallest: int) -> int:
    """To a sixteenth of the next power of two, or to ``smallest`` times that."""
    step = max(smallest, 1 << max(0, (value - 1).bit_length() - 4))
    return -(-value // step) * step


def room_for(lengths: Sequence[int], window: int | None = None) -> tuple[int, int, tuple[int, ...]]:
    """(longest, number of tokens, lengths) of the shape that segments are laid into; the lengths begin with the given.

    Args:
        window: a model's sliding window, which the longest must not be rounded beyond.
    """
    longest = max(lengths) if window is not None else max(256, 1 << (max(lengths) - 1).bit_length())
    tokens = _rounded_up(sum(lengths), 64)
    added, missing = [], tokens - sum(lengths)
    while missing > 0:
        added.append(min(missing, longest))
        missing -= added[-1]
    used = len(lengths) + len(added)
    empty = max(8, 1 << (used - 1).bit_length()) - used
    return longest, tokens, (*lengths, *added, *(0 for _ in range(empty)))


class GraphMemory:
    """What the graphs of one GPU share: activations, and buffers by name. One forward uses it at a time.

    A recording leaves nothing alive in it, so the next one begins where that began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        is_cuda = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self.stream = torch.cuda.Stream(device) if is_cuda else None
        self.is_open = False
        """From a forward to its backward."""
        self._buffers: dict[str, torch.Tensor] = {}

    def buffer(self, name: str, like: torch.Tensor, tokens: int) -> torch.Tensor:
        """(..., tokens, d) of zeros or of what another graph left there: one piece of memory for all, under a name."""
        shape = (*like.shape[:-2], tokens, like.shape[-1])
        num_bytes = math.prod(shape) * like.element_size()
        if name not in self._buffers or self._buffers[name].numel() < num_bytes:
            # Graphs that were made before keep the smaller one.
            self._buffers[name] = torch.zeros(num_bytes, dtype=torch.uint8, device=like.device)
        return self._buffers[name][:num_bytes].view(like.dtype).view(shape)


class LayerGraphs:
    """The graphs of one decoder.

    Args:
        language: as for ``run_decoder``. sums: of its layers' trained weights; None for a decoder that is only asked.
        memory: of the GPU that it is on.
    """

    def __init__(self, language: Any, memory: GraphMemory, sums: Sums | None = None) -> None:
        self.language, self.memory, self.sums = language, memory, sums
        self._is_trained = sums is not None and any(p.requires_grad for p in language.layers.parameters())
        self._graphs: dict[Shape, _Graph | None] = {}
        uses_window = getattr(language.config, "use_sliding_window", False)
        self._window = getattr(language.config, "sliding_window", None) if uses_window else None

    @property
    def num_graphs(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(
        self,
        embeds: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        segments: Sequence[int],
        visual: torch.Tensor,
        tap: int | None,
        recompute: int,
        deepstack: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """((1, S, d) after the last layer, (n_visual, d) input of layer ``tap``); None for what has no graph.

        Arguments as for ``run_decoder``, but ``rotary``: what the layers take as ``position_embeddings``.
        """
        with_gradient = torch.is_grad_enabled() and self.sums is not None and embeds.requires_grad
        assert with_gradient or not (self._is_trained and torch.is_grad_enabled()), (
            "gradients of layers come with that of their input"
        )
        assert not any(layer.requires_grad for layer in deepstack)
        is_first = self.sums.are_empty() if with_gradient and self.sums is not None else None
        if embeds.is_cuda and not has_varlen(embeds):
            return None  # FP32: attention goes segment by segment, and a recording would keep the first pack's
        assert not self.memory.is_open, "a forward before the backward of the one before"
        longest, tokens, lengths = room_for(segments, self._window)
        shape = Shape(tokens, len(lengths), longest, tap, recompute, len(deepstack), is_first)
        graph = self._graph_of(shape, lengths, embeds, rotary)
        if graph is None and torch.are_deterministic_algorithms_enabled():
            graph = _Graph(self, shape, lengths, embeds, rotary, is_recorded=False)
        if graph is None:
            return None
        graph.load(embeds, rotary, lengths, visual, deepstack)
        if with_gradient:
            self.memory.is_open = True
            hidden, tapped = _Replay.apply(embeds, graph, self.memory)
        else:
            hidden, tapped = graph.replayed(embeds.shape[1])
        return hidden, None if tapped is None else tapped.flatten(0, 1).index_select(0, visual)

    def _graph_of(
        self,
        shape: Shape,
        lengths: Sequence[int],
        embeds: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> _Graph | None:
        if shape not in self._graphs:
            self._graphs[shape] = None
            return None
        if self._graphs[shape] is None and self.num_graphs < MAX_GRAPHS:
            self._graphs[shape] = _Graph(self, shape, lengths, embeds, rotary)
        return self._graphs[shape]


def graph_layers(model: Any, sums: Sums | None = None, memory: GraphMemory | None = None) -> GraphMemory:
    """Let the decoder layers of a vision-language model run as graphs; they are made when they are wanted.

    Args:
        memory: of another model's graphs, used where that is on the same device.

    Returns:
        the memory of this model's.
    """
    language = model.model.language_model
    device = next(language.layers.parameters()).device
    if memory is None or memory.device != device:
        memory = GraphMemory(device)
    setattr(language, GRAPHS, LayerGraphs(language, memory, sums))
    return memory


class _Graph:
    """One shape: its buffers, and the two graphs over them; without a GPU, or not ``is_recorded``, the same functions
    run as they are."""

    def __init__(
        self,
        owner: LayerGraphs,
        shape: Shape,
        lengths: Sequence[int],
        embeds: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        is_recorded: bool = True,
    ) -> None:
        self.layers, self.shape, self.sums = list(owner.language.layers), shape, owner.sums

        def buffer(name: str, like: torch.Tensor = embeds.detach()) -> torch.Tensor:
            return owner.memory.buffer(name, like, shape.tokens)

        self.has_backward, has_tap = shape.is_first is not None, shape.tap is not None
        self.embeds, self.last = buffer("embeds"), buffer("last")
        self.rotary = (buffer("cos", rotary[0]), buffer("sin", rotary[1]))
        self.deepstack = [buffer(f"deepstack {number}") for number in range(shape.deepstack)]
        self.tapped = buffer("tapped") if has_tap else None
        self.grad_embeds = buffer("grad embeds") if self.has_backward else None
        self.grad_last = buffer("grad last") if self.has_backward else None
        self.grad_tapped = buffer("grad tapped") if self.has_backward and has_tap else None
        self.how = self._arguments(lengths)
        self._kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._play: list[Callable[[], None]] = [self._forward, self._backward]
        if is_recorded and owner.memory.stream is not None:
            self._capture(owner.memory.stream, owner.memory.pool)

    def _capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        parts = [self._forward, self._backward][: 1 + self.has_backward]
        sums, self.sums = self.sums, None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries and compiled layers make what they keep before a graph is made; no weight learns of it.
            for part in parts:
                part()
        torch.cuda.current_stream().wait_stream(stream)
        self._kept, self.sums = [], sums
        self._play = []
        for part in parts:
            graph = torch.cuda.CUDAGraph()
            # Threads of the loader and of autograd go on while this one records.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                part()
            self._play.append(graph.replay)
        self._kept = []

    def load(
        self,
        embeds: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        lengths: Sequence[int],
        visual: torch.Tensor,
        deepstack: Sequence[torch.Tensor],
    ) -> None:
        """Lay a micro-batch into the buffers."""
        for own, given in zip((self.embeds, *self.rotary), (embeds.detach(), *rotary), strict=True):
            _fill(own, given)
        for own, added in zip(self.deepstack, deepstack, strict=True):
            own.zero_()
            own[0].index_copy_(0, visual, added.to(own.dtype))
        arguments = self._arguments(lengths)
        if "borders" in arguments:
            self.how["borders"].copy_(arguments["borders"])
        else:
            self.how = arguments

    def _arguments(self, lengths: Sequence[int]) -> dict[str, Any]:
        """What the layers are told of the segments; of a graph only the borders can change."""
        arguments = segment_arguments(tuple(lengths), self.embeds)
        if "borders" in arguments:
            return {**arguments, "longest": self.shape.longest}
        return segment_arguments(tuple(length for length in lengths if length), self.embeds)

    def replayed(self, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(last, tapped) of what was loaded, (1, size, d) each, in memory of their own."""
        self._play[0]()
        return self.last[:, :size].clone(), None if self.tapped is None else self.tapped[:, :size].clone()

    def replayed_backward(self, grad_last: torch.Tensor, grad_tapped: torch.Tensor | None) -> torch.Tensor:
        """(1, size, d) gradient of the embeddings; those of weights are in the sums."""
        size = grad_last.shape[1]
        assert self.grad_last is not None
        assert self.grad_embeds is not None
        assert self.sums is not None
        _fill(self.grad_last, grad_last)
        if self.grad_tapped is not None and grad_tapped is not None:
            _fill(self.grad_tapped, grad_tapped)
        self._play[1]()
        self.sums.mark_filled()
        return self.grad_embeds[:, :size].clone()

    def _layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers[number](hidden, position_embeddings=self.rotary, **self.how)
        return out

    def _forward(self) -> None:
        hidden = self.embeds
        self._kept = []
        for number in range(len(self.layers)):
            into = hidden.detach().requires_grad_(self.has_backward)
            if self.tapped is not None and number == self.shape.tap:
                self.tapped.copy_(into.detach())
            keeps = self.has_backward and number >= self.shape.recompute
            with torch.set_grad_enabled(keeps):
                out = self._layer(number, into)
            if self.has_backward:
                self._kept.append((into, out if keeps else None))
            hidden = out.detach()
            del out  # and what hangs on it, before the next layer needs as much
            if number < self.shape.deepstack:
                hidden = hidden + self.deepstack[number]
        self.last.copy_(hidden)

    def _backward(self) -> None:
        assert self.grad_last is not None
        assert self.grad_embeds is not None
        gradient = self.grad_last
        while self._kept:
            into, out = self._kept.pop()
            number = len(self._kept)
            if out is None:
                with torch.enable_grad():
                    out = self._layer(number, into)
            leaves = [p for p in self.layers[number].parameters() if p.requires_grad]
            gradient, *found = torch.autograd.grad(out, [into, *leaves], gradient)
            if self.sums is not None:
                for leaf, of_leaf in zip(leaves, found, strict=True):
                    self.sums.add(leaf, of_leaf)
            del out, found
            if number == self.shape.tap and self.grad_tapped is not None:
                gradient = gradient + self.grad_tapped
        self.grad_embeds.copy_(gradient)


def _fill(own: torch.Tensor, given: torch.Tensor) -> None:
    """``given`` (..., s, d) at the start of ``own``, zeros behind it."""
    size = given.shape[-2]
    own[..., :size, :].copy_(given)
    own[..., size:, :].zero_()


class _Replay(torch.autograd.Function):
    """The layers as one step of autograd: (embeds) -> (last, tapped)."""

    @staticmethod
    def forward(ctx: Any, embeds: torch.Tensor, graph: _Graph, memory: GraphMemory) -> Any:
        ctx.graph, ctx.memory = graph, memory
        return graph.replayed(embeds.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_last: torch.Tensor, grad_tapped: torch.Tensor | None) -> Any:
        ctx.memory.is_open = False
        return ctx.graph.replayed_backward(grad_last, grad_tapped), None, None
