"""One request on its way: what it is given, what it has, how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from grace_vlm.engine.lookup import Lookup
from grace_vlm.engine.sampling import Chooser, SamplingParams
from grace_vlm.errors import RequestError
from grace_vlm.models.adapter import Grid

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class EngineImage:
    """A picture as the tower takes it: its grid in patches, and the processor's pixels.

    ``digest``: ``pixels_digest`` of both, where it is known already.
    """

    grid: Grid
    pixels: torch.Tensor
    digest: bytes | None = None


@dataclass(frozen=True)
class Prompt:
    """What a request asks.

    Args:
        ids: (S,) int64, a token for every visual token. positions: (3, S) int64. visual: (v,) int64, where the visual
            tokens stand. images: pictures in order.
    """

    ids: np.ndarray
    positions: np.ndarray
    visual: np.ndarray
    images: Sequence[EngineImage] = ()


def require_usable(name: str, prompt: Prompt, num_words: int, num_visual: int) -> None:
    """``RequestError`` for what would end a forward, and with it the requests beside.

    Args:
        num_words: of the model. num_visual: tokens that the prompt's pictures make.
    """
    if not len(prompt.ids):
        raise RequestError(f"request {name} has an empty prompt; expected at least one token")
    if prompt.ids.min() < 0 or prompt.ids.max() >= num_words:
        wrong = next(int(token) for token in prompt.ids if not 0 <= token < num_words)
        raise RequestError(f"request {name} has token {wrong}; the model has tokens 0 to {num_words - 1}")
    least, most = int(prompt.positions.min()), int(prompt.positions.max())
    if least < 0 or most >= len(prompt.ids):
        raise RequestError(
            f"request {name} has positions {least} to {most} for {len(prompt.ids)} tokens; expected 0 to at most one "
            "less than tokens: encode it with the model's own processor"
        )
    if len(prompt.visual) != num_visual:
        raise RequestError(
            f"request {name} has {len(prompt.visual)} visual tokens and its {len(prompt.images)} pictures make "
            f"{num_visual}; encode it with the model's own processor"
        )


@dataclass(frozen=True)
class Features:
    """What the decoder is given of a request's pictures: (v, d) embeddings, and (v, d) each for the first layers."""

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]

    def split(self, counts: Sequence[int]) -> list[Features]:
        """Parts of so many rows each, end to end; of the same memory."""
        layers = [layer.split(list(counts)) for layer in self.deepstack]
        embeds = self.embeds.split(list(counts))
        return [Features(own, tuple(layer[n] for layer in layers)) for n, own in enumerate(embeds)]

    def clone(self) -> Features:
        """The same in memory of its own."""
        return Features(self.embeds.clone(), tuple(layer.clone() for layer in self.deepstack))


@dataclass(eq=False)
class Request:
    """A request inside the engine.

    ``ends``: tokens that end the answer. ``num_done``: tokens whose keys and values are in the cache; a new token is
    chosen whenever all are. ``lookup``: prompt and answer for drafts, from the first one on.
    """

    id: str
    prompt: Prompt
    params: SamplingParams
    ends: frozenset[int] = frozenset()
    pages: list[int] = field(default_factory=list)
    features: Features | None = None
    num_done: int = 0
    finish: Finish | None = None
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        self.chooser = Chooser(self.params, self.prompt.ids.tolist())
        self._position_offset = int(self.prompt.positions[:, -1].max()) + 1 - len(self.prompt.ids)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt.ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return self.num_prompt + len(self.chooser.answer)

    @property
    def most_tokens(self) -> int:
        """That it may ever have in the cache; the last token of an answer is never put there."""
        return self.num_prompt + self.params.max_tokens - 1

    @property
    def num_missing(self) -> int:
        """Tokens that must run before one is chosen."""
        return self.num_tokens - self.num_done

    @property
    def is_reading(self) -> bool:
        """Whether tokens of the prompt are missing."""
        return self.num_done < self.num_prompt

    @property
    def next_position(self) -> int:
        """Of the token that runs next, where that is one of the answer."""
        return self.num_done + self._position_offset

    def ids(self, count: int) -> list[int]:
        """The next ``count`` tokens to run."""
        first, prompt = self.num_done, self.prompt.ids
        of_prompt = prompt[first : first + count].tolist()
        start = max(first - len(prompt), 0)
        return of_prompt + self.chooser.answer[start : start + count - len(of_prompt)]

    def positions(self, count: int) -> np.ndarray:
        """(3, count) of those tokens: an answer goes on after the largest of the prompt's last token."""
        first = self.num_done
        of_prompt = self.prompt.positions[:, first : first + count]
        rest = np.arange(max(first, self.num_prompt), first + count, dtype=np.int64) + self._position_offset
        return np.concatenate([of_prompt, np.broadcast_to(rest, (3, len(rest)))], axis=1)
