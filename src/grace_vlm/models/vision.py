"""The frozen tower's outputs, kept per picture while they fit a byte budget.

The tower is frozen, so its output for a picture never changes; the merger after it is trained and always runs. At
true size a picture's output is megabytes and the budget is 0 (off); on the toy models it removes the tower from
every step but the first that sees a picture.

A tower that is trained is asked anew each time, and may keep no activations (``recompute_tower``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import Adapter, Grid, TowerOutput


class HasPixels(Protocol):
    """What a picture must offer (``data.pictures.Picture``; ``models`` stands below ``data``)."""

    @property
    def key(self) -> str: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def pixels(self) -> torch.Tensor | None: ...


class VisionFeatures:
    """Tower outputs of one model.

    Args:
        budget_bytes: how much to keep on the model's device; full means no more is kept, nothing is dropped.
        trained: the tower is being trained: nothing is kept and the graph is.
    """

    def __init__(self, adapter: Adapter, model: Any, budget_bytes: int = 0, trained: bool = False) -> None:
        self.adapter, self.model, self.trained = adapter, model, trained
        self.budget_bytes = 0 if trained else budget_bytes
        self._kept: dict[str, TowerOutput] = {}
        self._held_bytes = 0

    def keeps(self, key: str) -> bool:
        return key in self._kept

    def of(self, pictures: Sequence[HasPixels]) -> list[TowerOutput]:
        """One output a picture, in order. A picture that stands twice in the batch runs once."""
        missing = {picture.key: picture for picture in pictures if picture.key not in self._kept}
        fresh: dict[str, TowerOutput] = {}
        if missing:
            pixels = [picture.pixels for picture in missing.values()]
            present = [p for p in pixels if p is not None]
            assert len(present) == len(pixels), "a picture came without pixels and is not kept"
            with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
                outputs = self.adapter.tower(self.model, present, [picture.grid for picture in missing.values()])
            fresh = dict(zip(missing, outputs, strict=True))
            for key, output in fresh.items():
                if self._held_bytes + output.num_bytes > self.budget_bytes:
                    break
                # A chunk of a batch would keep the whole batch alive.
                kept = TowerOutput(output.hidden.clone(), tuple(layer.clone() for layer in output.deepstack))
                self._kept[key] = kept
                self._held_bytes += kept.num_bytes
        return [fresh.get(picture.key) or self._kept[picture.key] for picture in pictures]


def recompute_tower(model: Any) -> None:
    """Let a trained vision tower keep no activations; the decoder's are ours to choose (``models/decoder.py``)."""
    # Renamed in Transformers 5.2x; 5.17 has the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.model.language_model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    # Transformers recomputes only in training mode, which must change nothing else.
    model.train()
    active = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if active:
        raise ConfigError(f"{active[0]} has dropout; set it to 0 in config.json, a resumed run must repeat itself")
