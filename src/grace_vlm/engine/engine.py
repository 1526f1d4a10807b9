"""Token ids and pictures in, token ids out: requests run together, step by step.

    engine = Engine(loaded, quantized)
    engine.add("a", prompt, SamplingParams(max_tokens=20))
    while engine.has_work:
        for event in engine.step():
            ...

A step admits what fits, runs one forward, over a token of every answer or over prompts, and chooses a token for each
request that has none missing. Nothing here knows texts, files or HTTP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from grace_vlm.engine.cache import PAGE_TOKENS, KeyValueCache, Pages, slots_of
from grace_vlm.engine.decode import DecodeStep
from grace_vlm.engine.draft import Drafter, num_right
from grace_vlm.engine.forward import Span, Step, forward
from grace_vlm.engine.guide import Guides
from grace_vlm.engine.layers import Weights, take_weights
from grace_vlm.engine.pictures import PictureFeatures
from grace_vlm.engine.recorded import RecordedPrompts
from grace_vlm.engine.request import Finish, Prompt, Request, require_usable
from grace_vlm.engine.sampling import Choice, SamplingParams, choose
from grace_vlm.engine.scheduler import Scheduler
from grace_vlm.errors import ConfigError, RequestError
from grace_vlm.kernels.cache_rows import FP8
from grace_vlm.kernels.cpu import alone
from grace_vlm.kernels.low_bit_cpu import PanelLinear
from grace_vlm.models.decoder import borders_of, has_varlen
from grace_vlm.models.load import LoadedModel, end_ids
from grace_vlm.quant.scheme import QuantizedTensor

INVARIANT_ROWS, INVARIANT_PIECE, INVARIANT_SPLITS = 16, 64, 8
"""Of ``batch_invariant``: rows of every product, tokens of a prompt at a time, shares of a context."""


TEAM_ROWS = 512
"""Rows of a prompt's step up to which torch has one thread beside the CPU's kernels. On two cores 128 rows then took
0.75 of the time, 512 as long, 1,500 a tenth longer."""
CpuActivations = Literal["int8", "fp32"]
CacheKind = Literal["model", "fp8"]
"""What keys and values are kept in: the model's dtype, or E4M3."""


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine, and what it keeps in fewer bits.

    Args:
        cache_tokens: of all running requests together. max_running: requests at a time. max_step_tokens: of one
            forward. picture_bytes: of kept pictures' features.
        batch_invariant: a request's tokens and log-probabilities are the same to the last bit whatever runs beside it.
        kv_cache: ``fp8`` keeps keys and values in a byte each, without a scale (``kernels/cache_rows.py``).
        int8_head: the head, and embeddings that are tied to it, in 8 bits with a scale a row (``vocabulary.py``).
        draft_tokens: of a greedy answer, proposed from its prompt and run at once; 0: none.
        cpu_activations: what a CPU's kernel multiplies low-bit weights with: ``int8``, bytes with a scale a token and
            group, or ``fp32``, exactly (``kernels/low_bit_cpu.py``).
    """

    cache_tokens: int = 16_384
    max_running: int = 64
    max_step_tokens: int = 2_048
    picture_bytes: int = 256 << 20
    batch_invariant: bool = False
    kv_cache: CacheKind = "model"
    int8_head: bool = False
    draft_tokens: int = 0
    cpu_activations: CpuActivations = "int8"

    def __post_init__(self) -> None:
        """``ConfigError`` for sizes that nothing could run in, and words that are no choice."""
        least = {"cache_tokens": PAGE_TOKENS, "max_running": 1, "picture_bytes": 0, "draft_tokens": 0}
        least["max_step_tokens"] = max(self.max_running, INVARIANT_PIECE if self.batch_invariant else 1)
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {smallest}")
        for name, choices in (("kv_cache", CacheKind), ("cpu_activations", CpuActivations)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(get_args(choices))}")
        if self.batch_invariant and self.draft_tokens:
            raise ConfigError(
                f"draft_tokens is {self.draft_tokens} with batch_invariant, but a draft's rows are summed in another "
                "order than single tokens; leave one of the two out"
            )


def _cache_dtype(options: EngineOptions, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the cache; ``ConfigError`` on a GPU whose kernels cannot read E4M3."""
    if options.kv_cache == "model":
        return dtype
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"kv_cache is 'fp8' and {name} cannot convert from it; expected compute capability 8.9 or newer, or 'model'"
        )
    return FP8


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step: a token was chosen, it ended, or both."""

    request_id: str
    choice: Choice | None
    finish: Finish | None


@dataclass
class _Rows:
    """A step under construction, on the host."""

    ids: list[int] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)
    embeds: list[torch.Tensor] = field(default_factory=list)
    deepstack: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)


class Engine:
    """Runs requests on one model.

    Args:
        loaded: its decoder's layers are taken over.
        quantized: codes and scales of its linears by module name.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        quantized: Mapping[str, QuantizedTensor] | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self.model, config = loaded.model, loaded.model.config.get_text_config()
        is_fixed = self.options.batch_invariant
        rows, piece, splits = (INVARIANT_ROWS, INVARIANT_PIECE, INVARIANT_SPLITS) if is_fixed else (None, None, None)
        head = loaded.adapter.head(loaded.model)
        exact = self.options.cpu_activations == "fp32"
        self.weights: Weights = take_weights(loaded.model, head, quantized or {}, rows, self.options.int8_head, exact)
        own = self.weights
        if own.device.type == "cuda":
            # Kernels fetch weights before they wait for what was launched before them (``starts_early``).
            torch.cuda.synchronize(own.device)
        budget = self.options.picture_bytes
        self.pictures = PictureFeatures(loaded.adapter, loaded.model, budget, own.device, alone=is_fixed)
        num_pages = self.options.cache_tokens // PAGE_TOKENS
        # One page more, for rows of a step that no request has.
        shape = (len(own.layers), num_pages + 1, own.num_kv_heads, own.head_dim)
        self.cache = KeyValueCache(*shape, _cache_dtype(self.options, own.dtype, own.device), own.device)
        self.pages = Pages(num_pages)
        self.scheduler = Scheduler(
            self.pages, self.options.max_running, self.options.max_step_tokens, config.max_position_embeddings, piece
        )
        self.end_ids = end_ids(loaded)
        self.guides = Guides(loaded.processor.tokenizer, own.embeddings.num_words, self.end_ids)
        most = min(config.max_position_embeddings, num_pages * PAGE_TOKENS)
        self.decode = DecodeStep(own, self.cache, self.options.max_running, most, splits)
        self.drafter = Drafter(self.options.draft_tokens)
        on_gpu = own.device.type == "cuda"
        # In a recording a prompt may be summed in another order than beside others.
        self._prompts = (
            RecordedPrompts(own, self.cache, self.options.max_step_tokens) if on_gpu and not is_fixed else None
        )
        in_panels = all(isinstance(weight, PanelLinear) for weight in own.products)
        self._team = alone if in_panels else contextlib.nullcontext
        """In which products of few rows run fastest: beside the CPU's low-bit kernel no others are to be awake."""
        self._is_ahead = on_gpu and not self.drafter.most
        """Whether a step is launched before the last one is read: on a CPU that would only cost, and a draft follows
        what was read."""
        self._decoding: list[Request] = []
        """Whose rows ``decode`` has, as they are after the last step."""
        self._queued: tuple[list[Request], torch.Tensor, torch.cuda.Event | None] | None = None
        """A step that is on its way: its requests, their tokens on theirs, and when these may be read."""
        self._arrivals = [torch.empty(self.options.max_running, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        """Queue a request; ``RequestError`` if its name is taken, it is empty, or it could never run."""
        if request_id in self._requests:
            raise RequestError(f"request {request_id} is there already; give each a name of its own")
        adapter, config = self.pictures.adapter, self.model.config
        num_visual = sum(adapter.num_visual_tokens(config, image.grid) for image in prompt.images)
        require_usable(request_id, prompt, self.weights.embeddings.num_words, num_visual)
        guide = None if params.json_schema is None else self.guides.of_schema(str(params.json_schema))
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        request = Request(request_id, prompt, params, ends)
        request.chooser.guide = guide
        self.scheduler.add(request)
        self._requests[request_id] = request

    def cancel(self, request_id: str) -> bool:
        """End a request now; its pages are free for the next step. False if there is none of that name."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        request.finish = "cancelled"
        self.scheduler.remove(request)
        return True

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward; what it chose, request by request, several tokens of one with drafts. Nothing if nothing is to
        do."""
        device = self.weights.device
        # Triton, graphs and events go to the current GPU, whichever their tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self._one_step()

    def _one_step(self) -> list[Event]:
        if self._queued is not None:
            return self._resolve()
        self.scheduler.admit()
        self._look()
        planned = self.scheduler.plan()
        if not planned:
            return []
        if planned[0][0].is_reading:
            return self._read(planned)
        return self._answer([request for request, _ in planned])

    def _look(self) -> None:
        """Features for requests that read a prompt with pictures; also for one that began when this failed before."""
        looking = [r for r in self.scheduler.running if r.prompt.images and r.features is None and r.is_reading]
        if not looking:
            return
        features = self.pictures.of([image for request in looking for image in request.prompt.images])
        for request, own in zip(looking, features.split([len(r.prompt.visual) for r in looking]), strict=True):
            request.features = own

    def _read(self, planned: list[tuple[Request, int]]) -> list[Event]:
        """A forward over prompts, or pieces of them."""
        self._decoding, rows = [], _Rows()
        planned.sort(key=lambda one: (one[1], one[0].num_done))  # neighbours of one size attend in one call
        for request, count in planned:
            self._lay(rows, request, count)
        step = self._step(rows)
        states = None if self._prompts is None else self._prompts.run(step)
        if states is None:
            # With many, attention is worth torch's threads.
            with self._team() if len(rows.ids) <= TEAM_ROWS else contextlib.nullcontext():
                states = forward(self.weights, self.cache, step)
        choosing = []
        for request, count in planned:
            request.num_done += count
            if not request.is_reading:
                request.features = None
                choosing.append(request)
        if not choosing:
            return []
        choices = choose(self.weights.head(states), [request.chooser for request in choosing])
        return [self._chosen(request, choice) for request, choice in zip(choosing, choices, strict=True)]

    def _answer(self, requests: list[Request]) -> list[Event]:
        """A step of answers alone."""
        drafts = self.drafter.drafts(requests, self.options.max_step_tokens - len(requests))
        if any(drafts):
            return self._verify(requests, drafts)
        with self._team():
            return self._decode(requests)

    def _decode(self, requests: list[Request]) -> list[Event]:
        """A token each. If all are greedy, they may be read when the next step is on its way."""
        if requests != self._decoding:
            self.decode.load(requests)
        self._decoding = requests
        logits = self.decode.run(len(requests))
        for request in requests:
            request.num_done += 1
        if all(request.params.is_plain for request in requests):
            self._queue(requests)
            return self._resolve()
        choices = choose(logits, [request.chooser for request in requests])
        events = [self._chosen(request, choice) for request, choice in zip(requests, choices, strict=True)]
        self.decode.ids[: len(requests)] = torch.tensor([choice.token for choice in choices]).to(self.weights.device)
        self._decoding = [] if any(request.finish for request in requests) else requests
        return events

    def _verify(self, requests: list[Request], drafts: list[list[int]]) -> list[Event]:
        """A forward over every answer's missing token and its draft; what the model chooses itself is kept.

        Keys and values of wrong tokens stay behind those that a request has. The next forward writes over the first of
        them before it reads that far, and so on.
        """
        self._decoding, rows = [], _Rows()
        for request, draft in zip(requests, drafts, strict=True):
            self._lay(rows, request, 1, draft)
        with self._team():
            states = forward(self.weights, self.cache, self._step(rows))
        pairs = list(zip(requests, drafts, strict=True))
        choosers = [request.chooser for request, draft in pairs for _ in range(1 + len(draft))]
        choices, events = choose(self.weights.head(states), choosers), list[Event]()
        for request, draft in pairs:
            own, choices = choices[: 1 + len(draft)], choices[1 + len(draft) :]
            right, first = num_right(draft, [choice.token for choice in own]), len(events)
            request.num_done += 1 + right
            for choice in own[: 1 + right]:
                if request.finish is None:
                    events.append(self._chosen(request, choice))
            self.drafter.count(draft, min(right, len(events) - first))
        return events

    def _queue(self, requests: list[Request]) -> None:
        """The tokens of the step that was launched, on their way to the host."""
        tokens = self.decode.ids[: len(requests)]
        if not tokens.is_cuda:
            self._queued = (requests, tokens.clone(), None)
            return
        # Two places in turns: one is read while the other is on its way.
        self._arrivals.reverse()
        arrived = self._arrivals[0][: len(requests)]
        arrived.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._queued = (requests, arrived, event)

    def _resolve(self) -> list[Event]:
        """What the step on its way chose. If nothing can have changed, the next one is launched before it is read."""
        assert self._queued is not None
        requests, tokens, arrived = self._queued
        self._queued = None
        ahead = (
            self._is_ahead
            and not self.scheduler.could_admit()
            and requests == self.scheduler.running
            and all(len(request.chooser.answer) + 2 <= request.params.max_tokens for request in requests)
        )
        if ahead:
            self.decode.run(len(requests))
            self._queue(requests)
        if arrived is not None:
            arrived.synchronize()
        events = []
        for request, token in zip(requests, tokens.tolist(), strict=True):
            if request.finish is None:  # cancelled, or ended by a step before
                events.append(self._chosen(request, Choice(token)))
        if ahead:
            for request in requests:
                request.num_done += 1
        if any(request.finish for request in requests):
            self._decoding = []
        return events

    def _lay(self, rows: _Rows, request: Request, count: int, draft: Sequence[int] = ()) -> None:
        """The next tokens of a request and a draft behind them, after those that are there."""
        first, done = len(rows.ids), request.num_done
        is_last = done + count == request.num_tokens
        rows.ids += [*request.ids(count), *draft]
        count += len(draft)
        rows.positions.append(torch.from_numpy(request.positions(count).copy()))
        rows.slots += slots_of(request.pages, done, count)
        rows.context += slots_of(request.pages, 0, done + count)
        rows.spans.append(Span(count, done + count))
        if is_last:
            rows.wanted += range(first + count - 1 - len(draft), first + count)
        if request.features is None:
            return
        visual = request.prompt.visual
        low, high = ((visual < edge).sum() for edge in (done, done + count))
        if low < high:
            rows.visual += [first + int(place) - done for place in visual[low:high]]
            rows.embeds.append(request.features.embeds[low:high])
            rows.deepstack.append(tuple(layer[low:high] for layer in request.features.deepstack))

    def _step(self, rows: _Rows) -> Step:
        device = self.weights.device

        def there(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device)

        embeds = self.weights.embeddings(there(rows.ids))
        visual = there(rows.visual)
        borders = None
        if has_varlen(embeds) and not self.options.batch_invariant:
            counts, lengths = zip(*((span.count, span.length) for span in rows.spans), strict=True)
            borders = (borders_of(counts, device), borders_of(lengths, device))
        if rows.embeds:
            embeds = embeds.index_copy(0, visual, torch.cat(rows.embeds).to(embeds.dtype))
        return Step(
            embeds=embeds,
            positions=torch.cat(rows.positions, dim=1).to(device),
            slots=there(rows.slots),
            spans=rows.spans,
            context=there(rows.context),
            borders=borders,
            visual=visual,
            deepstack=[torch.cat(layer) for layer in zip(*rows.deepstack, strict=True)],
            wanted=there(rows.wanted),
            alone=self.options.batch_invariant,
        )

    def _chosen(self, request: Request, choice: Choice) -> Event:
        request.chooser.take(choice.token)
        if choice.token in request.ends:
            request.finish = "stop"
        elif len(request.chooser.answer) == request.params.max_tokens:
            request.finish = "length"
        if request.finish:
            self.scheduler.remove(request)
            del self._requests[request.id]
        # A token that ends an answer is not of it.
        return Event(request.id, None if request.finish == "stop" else choice, request.finish)
