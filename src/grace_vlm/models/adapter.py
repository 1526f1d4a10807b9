"""What the product must know of an architecture, and nothing more.

Models are Transformers' own classes. An adapter names the parts of one (decoder, head, vision tower, what may be
quantized, what is trained) and runs them in the order that the method needs:

    pixels --tower--> TowerOutput --merge--> visual embeddings --decode--> hidden states --head--> logits
             frozen, once a picture          trained               at every position      at supervised ones

A new architecture is one file with one class and an entry in ``registry.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

Grid = tuple[int, int, int]
"""(temporal, height, width) of a picture in patches."""


@dataclass(frozen=True)
class TowerOutput:
    """What the frozen vision tower says about one picture; what may be kept of it.

    Args:
        hidden: (n_patches, d_vision) before the merger.
        deepstack: one (n_tokens, d_text) tensor per decoder layer that receives vision features; may be empty.
    """

    hidden: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.hidden, *self.deepstack))


@dataclass(frozen=True)
class DecoderStates:
    """Hidden states of a forward pass.

    Args:
        last: (B, S, d) after the final norm: what the head reads.
        relational: (n_visual, d) input of the tapped layer at the visual tokens, row after row; None if not asked for.
    """

    last: torch.Tensor
    relational: torch.Tensor | None


class Adapter(Protocol):
    """One architecture. Stateless: every method is given the model."""

    model_type: str
    quantizable: str
    """Regular expression (full match) of the linears that a scheme applies to."""
    frozen: tuple[str, ...]
    """Parameter name prefixes that are not trained by default (vision tower)."""

    def image_token_id(self, model: Any) -> int: ...

    def num_visual_tokens(self, model: Any, grid: Grid) -> int: ...

    def positions(self, model: Any, input_ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
        """(3, S) position ids of one unpadded sequence."""
        ...

    def head(self, model: Any) -> nn.Linear: ...

    def tower(self, model: Any, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[TowerOutput]:
        """One output a picture; ``pixels[i]`` is (n_patches_i, patch_dim)."""
        ...

    def decode(
        self,
        model: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        vision: Sequence[TowerOutput],
        *,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        tap: int | None = None,
    ) -> DecoderStates:
        """Decoder forward.

        Args:
            input_ids: (B, S). position_ids: (3, B, S).
            vision: the batch's pictures in row order; merged here, with gradient.
            attention_mask: (B, S), only needed with left padding. cache: key-value cache, appended to.
            tap: index into ``hidden_states`` (-2: input of the last layer) of the relational features.
        """
        ...


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every ``nn.Linear`` by module name, (out_features, in_features), in model order."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
