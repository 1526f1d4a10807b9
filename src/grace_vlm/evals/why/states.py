"""A model that is looked into: one forward, and what passes between its decoder layers.

State l is what enters layer l (0 is the embeddings, visual tokens after the merger); state L is what leaves the last
of L layers. The relation loss taps state L - 1 (``loss.relational_layer`` -2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from grace_vlm.data.collate import Batch
from grace_vlm.models.adapter import TowerOutput, layer_names, plain_head
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.vision import VisionFeatures


@dataclass(frozen=True)
class States:
    """Of one batch, on the model's device, in its dtype.

    Args:
        hidden: (n_supervised, d) after the final norm, where a token is supervised: what the head reads.
        visual: L + 1 of (n_visual, d), at the visual tokens; empty if not asked for.
        layers: L pairs of (1, S, d), what enters and what leaves each layer; empty if not asked for.
    """

    hidden: torch.Tensor
    visual: tuple[torch.Tensor, ...] = ()
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


class Watched:
    """A frozen model with names for what is looked at: ``layers`` (modules, in order) and ``head`` ((V, d) weight)."""

    def __init__(self, loaded: LoadedModel, whose: str) -> None:
        self.loaded, self.model, self.adapter = loaded, loaded.model, loaded.adapter
        self.model.requires_grad_(False).eval()
        self.layers: list[Any] = [self.model.get_submodule(n) for n in layer_names(self.model, self.adapter)]
        self.head = plain_head(self.adapter.head(self.model), whose).detach()
        self.device = self.head.device
        self._vision = VisionFeatures(self.adapter, self.model)

    @torch.no_grad()
    def vision(self, batch: Batch) -> list[TowerOutput]:
        """What the tower says about a batch's pictures, for ``states`` of any model with the same tower."""
        return self._vision.of(batch.pictures)

    @torch.no_grad()
    def states(self, batch: Batch, vision: list[TowerOutput], *, visual: bool = False, layers: bool = False) -> States:
        """One forward. ``batch``: on the device. ``visual``, ``layers``: whether these are kept."""
        with _between(self.layers if visual or layers else []) as passed:
            out = self.adapter.decode(
                self.model,
                batch.input_ids,
                batch.position_ids,
                vision,
                segments=batch.segments,
                visual=batch.visual,
            )
        hidden = out.last.flatten(0, 1).index_select(0, batch.supervised)
        entered = [pair[0] for pair in passed] + [passed[-1][1]] if visual else []
        seen = tuple(state.flatten(0, 1).index_select(0, batch.visual) for state in entered)
        return States(hidden, seen, tuple(passed) if layers else ())


@contextlib.contextmanager
def _between(layers: list[Any]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """A list that has (what entered, what left) of each layer when the block has run a forward."""
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: Any, given: tuple[torch.Tensor, ...], left: torch.Tensor) -> None:
        passed.append((given[0], left))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield passed
    finally:
        for hook in hooks:
            hook.remove()
