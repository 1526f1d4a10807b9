"""What the product must know of an architecture, and nothing more.

Models are Transformers' own classes. An adapter names the parts of one (decoder, head, vision tower, what may be
quantized, what is trained) and runs them in the order that the method needs:

    pictures --patchify--> pixels --tower--> TowerOutput --merge--> visual embeddings --decode--> hidden states --head--> logits
                                   frozen, once a picture  trained                at every position  at supervised ones

A new architecture is one file with one class: here with an entry in ``registry.py``, elsewhere as an installed plug-in
(docs/extending.md). What does not change from one architecture to the next is in ``decoder.py``.
"""  # noqa: E501 - the drawing

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from grace_vlm.errors import ConfigError
from grace_vlm.quant.plan import LinearShape, Part, QuantPlan, make_plan
from grace_vlm.quant.scheme import ScaleRounding

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
    deepstack: tuple[torch.Tensor, ...] = ()

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
    """One architecture. Stateless: every method is given the model, or only its configuration."""

    model_type: str
    parts: Mapping[Part, str]
    """Part -> regular expression (full match) of the names of its linears and embeddings. ``language`` is what a
    recipe's scheme applies to; the other parts stay in BF16 unless a recipe gives them a scheme."""
    frozen: tuple[str, ...]
    """Parameter name prefixes that are not trained by default (vision tower)."""
    stored_names: tuple[tuple[str, str], ...]
    """(prefix of a module in the model, prefix in checkpoint files) where Transformers stores another name."""

    def image_token_id(self, config: Any) -> int: ...

    def num_visual_tokens(self, config: Any, grid: Grid) -> int: ...

    def positions(self, config: Any, input_ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
        """(3, S) position ids of one unpadded sequence; a model with plain positions has three equal rows."""
        ...

    def patchify(self, config: Any, image_processor: Any, images: Sequence[Any]) -> list[tuple[Grid, torch.Tensor]]:
        """(grid, pixels) of decoded RGB pictures, as the model's own image processor makes them."""
        ...

    def head(self, model: Any) -> nn.Linear:
        """The vocabulary's head: logits are its weight times the last hidden state, without a bias or a cap."""
        ...

    def tower(self, model: Any, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[TowerOutput]:
        """One output a picture, in order; ``pixels`` and ``grids`` are what ``patchify`` gave."""
        ...

    def merge(self, model: Any, vision: Sequence[TowerOutput]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """What the decoder is given of pictures: ((n_visual, d) in place of the visual tokens' embeddings, None
        without pictures; (n_visual, d) each, added to them after the first layers, one after each)."""
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
        segments: tuple[int, ...] | None = None,
        visual: torch.Tensor | None = None,
        recompute: int = 0,
    ) -> DecoderStates:
        """Decoder forward.

        Args:
            input_ids: (B, S). position_ids: (3, B, S).
            vision: the batch's pictures in row order; merged here, with gradient.
            attention_mask: (B, S), only needed with left padding. cache: key-value cache, appended to.
            tap: index into ``hidden_states`` (-2: input of the last layer) of the relational features.
            segments: lengths of the samples that lie end to end in a (1, S) row; no token sees another sample's.
            visual: (n_visual,) int64 flat positions of the visual tokens in B*S; None: looked for, at a GPU's cost.
            recompute: so many of the first layers keep no activations; the backward pass computes them again.
        """
        ...


def linear_shapes(model: nn.Module, parts: Mapping[Part, str] | None = None) -> dict[str, LinearShape]:
    """Every ``nn.Linear`` by module name in model order, and the embeddings that ``parts`` (an adapter's) names.

    Works on the meta device.
    """
    shapes: dict[str, LinearShape] = {}
    first_of: dict[int, str] = {}
    for name, module in model.named_modules():
        part = next((part for part, pattern in (parts or {}).items() if re.fullmatch(pattern, name)), None)
        is_embedding = isinstance(module, nn.Embedding) and part is not None
        if isinstance(module, nn.Linear) or is_embedding:
            weight: Any = module.weight
            owner = first_of.setdefault(id(weight), name)
            tied_to = None if owner == name else owner
            shapes[name] = LinearShape(weight.shape[0], weight.shape[1], part, tied_to, is_embedding)
    return shapes


def layer_names(model: nn.Module, adapter: Adapter) -> list[str]:
    """Module names of the decoder's layers, in order: those that hold the linears of the language model."""
    pattern = adapter.parts["language"]
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    return list(dict.fromkeys(re.sub(r"(\.layers\.\d+)\..*", r"\1", name) for name in names))


def plan_model(
    model: nn.Module,
    adapter: Adapter,
    scheme: str,
    part_schemes: Mapping[Part, str] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    scale_rounding: ScaleRounding = "bf16",
) -> QuantPlan:
    """Which linear gets which grid: ``scheme`` for the language model, then parts, then patterns; the last wins.

    Raises:
        ConfigError: a pattern that matches nothing, an unknown scheme, a group size that does not divide.
    """
    of_parts = [(adapter.parts[part], text) for part, text in (part_schemes or {}).items()]
    shapes = linear_shapes(model, adapter.parts)
    return make_plan(shapes, adapter.parts["language"], scheme, [*of_parts, *overrides], scale_rounding)


def plain_head(head: nn.Module, whose: str) -> torch.Tensor:
    """(V, d) weight of a vocabulary head; ``ConfigError`` if logits are not just weight times hidden state."""
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(
            f"the {whose}'s head is {type(head).__name__}{' with a bias' if isinstance(head, nn.Linear) else ''}; "
            "expected nn.Linear without a bias: the loss multiplies by its weight itself"
        )
    return head.weight


def stored_name(adapter: Adapter, name: str) -> str:
    """The name that checkpoint files have for a module or tensor of the model."""
    for ours, theirs in adapter.stored_names:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name
