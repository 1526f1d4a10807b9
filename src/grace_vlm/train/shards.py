"""Decoder layers of which a process has its rows only: all the rest comes and goes while a step computes.

``runtime.sharding`` as the field names it, with what is on every process in between:

    optimizer   (ZeRO-1)         masters, scales and moments are shared out; leaves and gradient sums are whole
    gradients   (ZeRO-2)         and the gradient sums of the decoder's layers
    parameters  (ZeRO-3, FSDP2)  and the weights of the decoder's layers; the next layer's come while one computes

                forward                                      backward
    enter(i)    wait for W(i), ask for W(i+1)                add up dW(i) over processes, free W(i)
    layer(i)    computes                                     computes, again first if it kept no activations
    leave(i)    free W(i)                                    wait for W(i), ask for W(i-1)

Gradients are added up in the sums' precision (FP32; FP64 models in FP64) **before** they are rounded anywhere, each
matrix into the rows of its owner, while the layer before computes; the owner adds them to its sum over micro-batches.
One process adds up micro-batches first and processes then, this the other way: the same up to the order of FP32 sums,
and the same bits where a process has one micro-batch a step.

Weights are freed and come back **in the same storage** under the same tensor, because autograd keeps references of it
from forward to backward; each matrix is gathered where it stands, so nothing is copied in or out. What has no rows to
share out (norms, biases), and all that is no decoder layer (the table of words and its head, merger, tower), is whole
on every process: a tower's layers run only where a micro-batch has a picture, and an exchange that one process skips
would never end. Every process has as many micro-batches, so all pass here equally often.

Not ``torch.distributed.fsdp.fully_shard``; docs/decisions.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grace_vlm.models.decoder import SHARDS
from grace_vlm.train.ranks import Going, Ranks
from grace_vlm.train.sums import GradientSum


@dataclass
class Matrix:
    """One weight of a layer.

    Args:
        leaf: what the layer computes with. share: this process's rows of it.
        own: those rows where they stay when the leaf is freed; None: the leaf is never freed.
        total: (rows of the share, in), where its gradient is added up; None: it is not trained.
    """

    leaf: torch.Tensor
    share: slice
    own: torch.Tensor | None = None
    total: GradientSum | None = None
    whole: torch.Tensor = field(init=False)
    """The leaf's memory by another name: what is written through the leaf, autograd would take for a change of it."""

    def __post_init__(self) -> None:
        self.whole = self.leaf.data


def cut_loose(leaf: torch.Tensor, share: slice, device: torch.device | None = None) -> torch.Tensor:
    """Free all of a leaf; returns its rows ``share`` in memory of their own, both on ``device`` (None: where it is).

    The leaf gets a storage that can be freed and allocated again, which one that was read from a file cannot.
    """
    own = leaf.detach()[share].to(device or leaf.device, copy=True)
    leaf.data = torch.empty(leaf.shape, dtype=leaf.dtype, device=own.device)
    leaf.untyped_storage().resize_(0)
    return own


class LayerShards:
    """The layers of one decoder, for its loop (``models.decoder``).

    Args:
        layers: their matrices, layer by layer in the order in which they run.
    """

    def __init__(self, layers: Sequence[Sequence[Matrix]], ranks: Ranks) -> None:
        self.ranks = ranks
        self._layers = [tuple(layer) for layer in layers]
        self._coming: dict[int, Going] = {}
        self._here: set[int] = set()
        self._adding: tuple[Going, list[tuple[GradientSum, torch.Tensor]]] | None = None

    def enter(self, number: int, hidden: torch.Tensor) -> None:
        """Layer ``number`` is about to compute on ``hidden``."""
        self._need(number)
        self._ask(number + 1)
        if self._has_backward(number):
            # When the gradient of its input is whole the layer has made all of its own.
            hidden.register_hook(lambda _: self._passed_backward(number))

    def leave(self, number: int, hidden: torch.Tensor) -> None:
        """It has computed ``hidden``."""
        is_last = number + 1 == len(self._layers)
        if is_last and self._has_backward(number):
            hidden.register_hook(lambda _: self._enter_backward(number))  # and is here until then
        else:
            self._free(number)

    def finish(self) -> None:
        """Wait for what is being added up."""
        if self._adding is not None:
            going, shares = self._adding
            self._adding = None
            going.wait()
            for total, share in shares:
                total.add(share)

    def _has_backward(self, number: int) -> bool:
        return torch.is_grad_enabled() and any(matrix.total is not None for matrix in self._layers[number])

    def _enter_backward(self, number: int) -> None:
        self._need(number)
        self._ask(number - 1)

    def _passed_backward(self, number: int) -> None:
        self._add_up(number)
        self._free(number)
        if number:
            self._enter_backward(number - 1)

    def _freed(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(whole, own rows) of the matrices that come and go."""
        return [(matrix.whole, matrix.own) for matrix in self._layers[number] if matrix.own is not None]

    def _ask(self, number: int) -> None:
        """Start to gather a layer's weights, if there is such a layer and they are not here."""
        if not 0 <= number < len(self._layers) or number in self._here or number in self._coming:
            return
        pairs = self._freed(number)
        for whole, _ in pairs:
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
        if pairs:
            self._coming[number] = self.ranks.start_gather(*zip(*pairs, strict=True))

    def _need(self, number: int) -> None:
        self._ask(number)
        if number in self._coming:
            self._coming.pop(number).wait()
        self._here.add(number)

    def _free(self, number: int) -> None:
        """What was asked to compute with it has been queued before, and memory is used again in that order."""
        for whole, _ in self._freed(number):
            whole.untyped_storage().resize_(0)
        self._here.discard(number)

    def _add_up(self, number: int) -> None:
        """Start to add up the gradients of a layer; those of the one before have had its time."""
        self.finish()
        wholes, shares, totals = [], [], []
        for matrix in self._layers[number]:
            if matrix.total is not None:
                gradient, matrix.leaf.grad = matrix.leaf.grad, None
                if gradient is None:  # every process takes part, whatever it has
                    gradient = torch.zeros(matrix.leaf.shape, dtype=matrix.leaf.dtype, device=matrix.leaf.device)
                wholes.append(gradient.to(matrix.total.total.dtype).contiguous())
                shares.append(matrix.share)
                totals.append(matrix.total)
                del gradient  # one BF16 gradient at a time beside the FP32 ones
        going, found = self.ranks.start_sum_shares(wholes, shares)
        self._adding = going, list(zip(totals, found, strict=True))


def shard_frozen(model: Any, device: torch.device, ranks: Ranks) -> None:
    """Bring to ``device`` this process's rows, and no others, of the decoder layers of a vision-language model that is
    asked and not trained.

    Parameters and buffers alike: the linears of an FP8 teacher keep their bytes in buffers. What ``Ranks.share_of``
    does not share out stays whole, and so do scales of a row, a column each.
    """
    layers = []
    for layer in model.model.language_model.layers:
        matrices = []
        for tensor in (*layer.parameters(), *layer.buffers()):
            share = ranks.share_of(tensor)
            if share is not None and tensor.shape[1] > 1:
                matrices.append(Matrix(tensor, share, cut_loose(tensor, share, device)))
        layers.append(matrices)
    attach(model, LayerShards(layers, ranks))


def attach(model: Any, shards: LayerShards) -> None:
    """Let the decoder of a vision-language model run over its shards."""
    setattr(model.model.language_model, SHARDS, shards)
