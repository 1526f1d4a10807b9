"""How the next token is chosen, request by request: what is asked for, and the choice.

From raw logits z of one row, in this order:

    penalties     z_t <- z_t / r if z_t > 0 else z_t r      for tokens of the prompt or the answer (repetition)
                  z_t <- z_t - f count_t - p [count_t > 0]  for tokens of the answer (frequency, presence)
    schema        z_t <- -inf                               for what cannot become a document of it (guide.py)
    greedy        the largest z                             temperature 0
    else          P = softmax(z / temperature), sorted; kept are the first k (top_k), then those before which less than
                  top_p lies, then those of at least min_p of the largest; u of the request's own generator chooses
                  among them, renormalised

A request draws from its own generator, one number a token, so what runs beside it changes nothing of its draws.
Log-probabilities and entropy are of the raw logits.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grace_vlm.engine.guide import Guide
from grace_vlm.errors import RequestError
from grace_vlm.losses.gdkd import entropy_of


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of its answer.

    Args:
        max_tokens: no answer is longer. temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: probabilities.
        repetition_penalty: 1 is none. presence_penalty, frequency_penalty: 0 is none.
        seed: the same seed gives the same draws; None a new one.
        stop: texts before which the answer ends. stop_token_ids: tokens that end it, beside the model's own.
        ignore_eos: the model's own do not end it. logprobs: so many alternatives a token; None without.
        json_schema: the answer is a document of it, as text or as an object; None without.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """``RequestError`` for a value of another kind or outside its range."""
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            value, may_be_none = getattr(self, name), name in ("seed", "logprobs")
            is_right = type(value) is int or (value is None and may_be_none)
            _require(name, value, is_right, "a whole number" + (", or None" if may_be_none else ""))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if type(getattr(self, name)) not in (int, float):
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected a number")
        for name, kind, expected in (
            ("stop", str, "a text, or a list of texts"),
            ("stop_token_ids", int, "a list of ids"),
        ):
            value = (self.stop,) if name == "stop" and isinstance(self.stop, str) else getattr(self, name)
            is_right = isinstance(value, list | tuple) and all(type(one) is kind for one in value)
            _require(name, value, is_right, expected)
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        is_text = self.json_schema is None or isinstance(self.json_schema, str)
        _require("json_schema", self.json_schema, is_text, "a JSON schema, as text or as an object")
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _require("temperature", self.temperature, 0 <= self.temperature <= 100, "0 (greedy) to 100")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _require(
            "repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "above 0, at most 100"
        )
        _require("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 100, "-100 to 100")
        _require("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 100, "-100 to 100")
        _require("stop", self.stop, all(self.stop) and len(self.stop) <= 16, "at most 16 texts, none of them empty")
        _require("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20, or None")

    @property
    def is_plain(self) -> bool:
        """Greedy, with nothing else to know of the logits than the largest."""
        knows_more = self.has_penalties or self.logprobs is not None or self.json_schema is not None
        return self.temperature == 0 and not knows_more

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _require(name: str, value: object, is_right: bool, expected: str) -> None:
    is_number = not isinstance(value, float) or math.isfinite(value)
    if not (is_right and is_number):
        raise RequestError(f"{name} is {value!r}; expected {expected}")


@dataclass
class Chooser:
    """One request's choices: its parameters, its generator, what it has seen, and what it may say."""

    params: SamplingParams
    prompt: Sequence[int]
    answer: list[int] = field(default_factory=list)
    guide: Guide | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.params.seed)

    def draw(self) -> float:
        """In [0, 1), the next of this request."""
        return self._random.random()

    @property
    def changes_logits(self) -> bool:
        return self.params.has_penalties or self.guide is not None

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the largest of the model's own logits, whatever else is told of them."""
        return self.params.temperature == 0 and not self.changes_logits

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        """(V,) logits with this request's penalties, and without what it may not say."""
        found = self._penalized(logits) if self.params.has_penalties else logits
        if self.guide is not None:
            found = found.masked_fill(~self.guide.allowed().to(found.device), float("-inf"))
        return found

    def take(self, token: int) -> None:
        """The token is the answer's next one."""
        self.answer.append(token)
        if self.guide is not None:
            self.guide.accept(token)

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        params = self.params
        size = logits.shape[0]
        counts = torch.bincount(torch.tensor(self.answer, dtype=torch.int64), minlength=size).to(logits)
        seen = torch.bincount(torch.tensor(self.prompt, dtype=torch.int64), minlength=size).to(logits) + counts > 0
        scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        changed = torch.where(seen, scaled, logits)
        return changed - params.frequency_penalty * counts - params.presence_penalty * (counts > 0).to(logits)


@dataclass(frozen=True)
class Choice:
    """A token. With ``logprobs`` its own log-probability, (token, log-probability) of the likeliest, and the entropy in
    nats, in FP32, of the model's own distribution, before penalties, schema and temperature; None without."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    entropy: float | None = None


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[Choice]:
    """The next token of each row.

    Args:
        logits: (r, V) on any device. choosers: of the r rows; their answers do not change here.
    """
    wide = logits.float()
    changed = wide
    if any(chooser.changes_logits for chooser in choosers):
        changed = torch.stack([chooser.changed(row) for chooser, row in zip(choosers, wide, strict=True)])
    tokens = changed.argmax(dim=-1)
    drawn = [number for number, chooser in enumerate(choosers) if chooser.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _sampled(changed[rows], [choosers[number] for number in drawn])
    found = tokens.tolist()
    return [_choice(token, row, chooser.params) for token, row, chooser in zip(found, wide, choosers, strict=True)]


def _sampled(logits: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """(r,) int64 tokens of (r, V) logits."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    params = [chooser.params for chooser in choosers]
    # From the largest on: the smallest temperature then leaves it alone instead of infinities.
    spread = logits - logits.amax(-1, keepdim=True)
    probabilities = (spread / column([p.temperature for p in params])).softmax(-1)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    size = ordered.shape[1]
    kept = rank < column([float(p.top_k or size) for p in params])
    before = ordered.double().cumsum(-1) - ordered
    kept &= (before < column([p.top_p for p in params])) | (rank == 0)
    kept &= ordered >= column([p.min_p for p in params]) * ordered[:, :1]
    shares = torch.where(kept, ordered, 0.0).double().cumsum(-1)
    # The last share is the sum of what is kept; u of it lies before some kept token's end.
    u = torch.tensor([chooser.draw() for chooser in choosers], dtype=torch.float64, device=logits.device).unsqueeze(1)
    place = torch.searchsorted(shares, u * shares[:, -1:], right=True)
    last_kept = kept.to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)
    return order.gather(1, torch.minimum(place, last_kept)).squeeze(1)


def _choice(token: int, logits: torch.Tensor, params: SamplingParams) -> Choice:
    if params.logprobs is None:
        return Choice(token)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(params.logprobs) if params.logprobs else None
    pairs = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), pairs, float(entropy_of(logprobs)))
