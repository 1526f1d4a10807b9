"""The inputs of a decoder's linears, layer after layer, by the model's own forward.

To look at layer i, the forward is run with the layers before it cut short: layer i - 1 returns the states that it
gave when it was its turn, those before it return what they are given, and the run stops where enough has been seen
of layer i. So whatever a model does between its layers (DeepStack adds picture features there) happens as always, and
no layer is computed for another's sake.

Memory: one hidden state a token, (tokens, d) in the model's dtype, besides one (in, in) FP32 matrix for each distinct
input of the linears that are looked at together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from grace_vlm.errors import NonFiniteError
from grace_vlm.quant.affine import compute_dtype

Forward = Callable[[], Any]
"""Runs the model on one batch without padding."""


class _SeenError(Exception):
    """Ends a forward where what was asked for has been seen."""


@dataclass(frozen=True)
class Moments:
    """What is known of a linear's input x over the calibration tokens.

    Args:
        hessian: (in, in), mean of x x^T. magnitude: (in,), mean of abs(x). FP32, or FP64 if the model is.
    """

    hessian: torch.Tensor
    magnitude: torch.Tensor


class _Sums:
    def __init__(self) -> None:
        self.square: Any = 0.0
        self.absolute: Any = 0.0
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.to(compute_dtype(rows))
        self.square = self.square + rows.T @ rows
        self.absolute = self.absolute + rows.abs().sum(dim=0)
        self.num_tokens += len(rows)

    def moments(self) -> Moments:
        if not bool(torch.isfinite(self.square).all()):
            raise NonFiniteError(
                "calibration gave NaN or Inf in the inputs of a linear; look at the model and its rows"
            )
        return Moments(self.square / self.num_tokens, self.absolute / self.num_tokens)


class Replay:
    """Layers in order, each with the states that the quantized layers before it make.

    Args:
        names: module names of the layers of ``model`` in order, whose first argument and output are (B, S, d).
        forwards: one a batch, at least one.
    """

    def __init__(self, model: Any, names: Sequence[str], forwards: Sequence[Forward]) -> None:
        assert forwards, "a replay needs a batch"
        self.names, self.forwards = names, forwards
        self.layers = [model.get_submodule(name) for name in names]
        self._states: list[Any] = [None] * len(forwards)

    def moments(self, number: int, linears: Sequence[Any]) -> list[Moments]:
        """Of the inputs of ``linears`` inside layer ``number``, in the order in which they run; the run ends there.

        Raises:
            NonFiniteError: NaN or Inf in one.
        """
        sums = [_Sums() for _ in linears]

        def look(linear: Any, args: tuple[torch.Tensor, ...]) -> None:
            sums[linears.index(linear)].add(args[0])
            if linear is linears[-1]:
                raise _SeenError

        hooks = [linear.register_forward_pre_hook(look) for linear in linears]
        try:
            for batch in range(len(self.forwards)):
                self._run(number, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return [s.moments() for s in sums]

    def advance(self, number: int) -> None:
        """Layer ``number`` is done: keep what it gives now."""
        for batch in range(len(self.forwards)):
            self._states[batch] = self.run(number, batch)[1]

    def run(self, number: int, batch: int, with_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """What layer ``number`` is given in one batch, and what it gives: (B, S, d) each; ``with_grad``: with the graph
        of what it computed."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def stop(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found.append((args[0], output))
            raise _SeenError

        hook = self.layers[number].register_forward_hook(stop)
        try:
            self._run(number, batch, with_grad)
        finally:
            hook.remove()
        return found[0]

    def _run(self, number: int, batch: int, with_grad: bool = False) -> None:
        with (
            torch.set_grad_enabled(with_grad),
            _cut_short(self.layers[:number], self._states[batch]),
            suppress(_SeenError),
        ):
            self.forwards[batch]()


@contextmanager
def _cut_short(layers: Sequence[Any], state: torch.Tensor | None) -> Iterator[None]:
    """``layers`` return what they are given, and the last of them ``state``."""

    def same(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden_states

    for layer in layers[:-1]:
        layer.forward = same
    for layer in layers[-1:]:
        layer.forward = lambda *_args, **_kwargs: state
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
