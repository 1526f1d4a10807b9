"""What quantizing one decoder layer does to it, and what that does to the logits.

One layer at a time is taken from the quantized model and put into the unquantized one; everything else stays. With f
the layer, f_q its quantized form and x what enters it, the same in both,

    weight error   |W_q - W| / |W|                            over the layer's linears
    output error   |f_q(x) - f(x)| / |f(x) - x|               over all tokens: of what the layer adds
    effect         mean KL(p || p_q) at supervised tokens     p of the unquantized model, T = 1, nats
    flips          share of supervised tokens whose likeliest word changes

A single linear's effect and weight error are the same with that linear alone taken from the quantized model; asked for,
since they cost a forward each, and only where norms are the same in both.

A whole layer, norms and all, because AWQ folds scales from norms into linears: alone, neither is what it was. For the
same reason a weight error means something only where weights were rounded and nothing else; an output error always
does. Of a *trained* model all of them hold training and rounding together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grace_vlm.data.collate import Batch
from grace_vlm.errors import ConfigError
from grace_vlm.evals.why.states import States, Watched
from grace_vlm.evals.why.vocabulary import divergence
from grace_vlm.models.adapter import TowerOutput


@contextlib.contextmanager
def swapped(layer: nn.Module, other: nn.Module) -> Iterator[None]:
    """``layer`` computes with the parameters of ``other`` inside the block.

    Raises:
        ConfigError: the two have different parameters.
    """
    own, theirs = dict(layer.named_parameters()), dict(other.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    if shapes != {name: tuple(p.shape) for name, p in theirs.items()}:
        raise ConfigError(
            "the model and --before have layers of different parameters; give the unquantized model of the same sizes"
        )
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = theirs[name].data
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]


@torch.no_grad()
def weight_error(layer: nn.Module, other: nn.Module) -> float:
    """|W_other - W| / |W| over all linears of two layers of the same shape."""
    theirs = dict(other.named_modules())
    apart = whole = 0.0
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            own, its = module.weight.double(), theirs[name].weight.double()
            apart += float((its - own).square().sum())
            whole += float(own.square().sum())
    return math.sqrt(apart / whole) if whole else 0.0


@dataclass
class _Sums:
    """Of one layer, or of the whole model: squared lengths, nats and tokens so far."""

    error: float = 0.0
    added: float = 0.0
    kl: float = 0.0
    flips: int = 0
    tokens: int = 0

    def count(self, kl: torch.Tensor, differs: torch.Tensor) -> None:
        self.kl += float(kl.double().sum())
        self.flips += int(differs.sum())
        self.tokens += len(kl)

    def said(self) -> dict[str, Any]:
        tokens = self.tokens or 1
        return {"kl": self.kl / tokens, "flips": self.flips / tokens}


@dataclass
class _Linear:
    """One linear of a layer, in both models."""

    layer: int
    name: str
    own: nn.Module
    other: nn.Module
    sums: _Sums = field(default_factory=_Sums)

    def said(self) -> dict[str, Any]:
        error = weight_error(self.own, self.other)
        return {"layer": self.layer, "linear": self.name, "weight_error": error, **self.sums.said()}


@torch.no_grad()
def only_linears_differ(layer: nn.Module, other: nn.Module) -> bool:
    """Whether everything of two layers but the weights of linears is the same: AWQ folds scales into norms, and
    training moves them, and then a linear of one in the other is in a place that it was not made for."""
    linears = {f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    theirs = dict(other.named_parameters())
    own = dict(layer.named_parameters())
    # Other parameters altogether are refused by ``swapped``, with a reason.
    return own.keys() == theirs.keys() and all(
        name in linears or torch.equal(p, theirs[name]) for name, p in own.items()
    )


class Damage:
    """Layer by layer, of ``quantized`` against ``before``.

    Args:
        linears: also each linear alone, if both have the same norms.

    Raises:
        ConfigError: they do not have the same layers.
    """

    def __init__(self, before: Watched, quantized: Watched, linears: bool = False) -> None:
        if len(before.layers) != len(quantized.layers):
            raise ConfigError(
                f"--before has {len(before.layers)} decoder layers and the model {len(quantized.layers)}; give the "
                "unquantized model of the same sizes"
            )
        self.before, self.quantized = before, quantized
        self._layers = [_Sums() for _ in before.layers]
        self._whole = _Sums()
        pairs = list(zip(before.layers, quantized.layers, strict=True))
        self.linears_left_out = linears and not all(only_linears_differ(layer, other) for layer, other in pairs)
        self._linears = [
            _Linear(number, name, module, other.get_submodule(name))
            for number, (layer, other) in enumerate(pairs if linears and not self.linears_left_out else [])
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]

    @torch.no_grad()
    def add(self, batch: Batch, vision: list[TowerOutput], base: States, own: States) -> None:
        """
        Args:
            batch: on the device. vision: of ``before``'s tower. base: its states, with ``layers``. own: the quantized
                model's.
        """
        head = self.before.head
        self._whole.count(*divergence(base.hidden, head, own.hidden, self.quantized.head))
        pairs = zip(self.before.layers, self.quantized.layers, self._layers, strict=True)
        for number, (layer, other, sums) in enumerate(pairs):
            with swapped(layer, other):
                found = self.before.states(batch, vision, layers=True)
            entered, left = base.layers[number]
            sums.error += float((found.layers[number][1].double() - left.double()).square().sum())
            sums.added += float((left.double() - entered.double()).square().sum())
            sums.count(*divergence(base.hidden, head, found.hidden, head))
        for linear in self._linears:
            with swapped(linear.own, linear.other):
                hidden = self.before.states(batch, vision).hidden
            linear.sums.count(*divergence(base.hidden, head, hidden, head))

    def summary(self) -> dict[str, Any]:
        """``layers``: in order; ``whole``: the quantized model itself; ``sum_of_layers``: of their effects, which is
        ``whole`` where layers do not meet; ``linears``: each by layer and name, None if they were not asked for."""
        layers = [
            {
                "layer": number,
                "weight_error": weight_error(layer, other),
                "output_error": math.sqrt(sums.error / sums.added) if sums.added else 0.0,
                **sums.said(),
            }
            for number, (layer, other, sums) in enumerate(
                zip(self.before.layers, self.quantized.layers, self._layers, strict=True)
            )
        ]
        return {
            "num_tokens": self._whole.tokens,
            "layers": layers,
            "whole": self._whole.said(),
            "sum_of_layers": sum(layer["kl"] for layer in layers),
            "linears": [one.said() for one in self._linears] or None,
        }
