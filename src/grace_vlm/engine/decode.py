"""One token for each of many answers: the decoder's forward that runs most, as one launch on a GPU.

Everything that changes from token to token lies on the device, and the step itself moves it on: the token that was
chosen is the next one's input, positions and lengths grow by one. So the host launches a step without having seen what
the last one chose. A GPU records the step once for each number of rows (1, 2, 4, ... ``max_rows``); rows that no
request has write to a page that none owns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grace_vlm.engine.cache import PAGE_TOKENS, KeyValueCache, pages_for
from grace_vlm.engine.layers import Weights, linears_of
from grace_vlm.engine.recorded import Recorded, pool_of
from grace_vlm.engine.request import Request
from grace_vlm.kernels.decoder_layers_cpu import DecoderLayers, PanelLayer
from grace_vlm.kernels.decoder_rows import rms_norm
from grace_vlm.kernels.low_bit_cpu import PanelLinear
from grace_vlm.kernels.next_token import advance
from grace_vlm.kernels.paged_attention import paged_attention, splits_for


def panel_layers(weights: Weights, cache: KeyValueCache) -> DecoderLayers | None:
    """All layers as one call of the CPU's kernels; None where some part of them is not for those."""
    made = []
    for number, layer in enumerate(weights.layers):
        parts = []
        for linear in linears_of(layer):
            # A product of so many rows each time is ``Linear``'s own business.
            if not isinstance(linear.weight, PanelLinear) or linear.rows is not None:
                return None
            parts.append((linear.weight, linear.bias))
        own = PanelLayer(
            layer.attention_norm, layer.mlp_norm, weights.heads(layer), parts, cache.keys[number], cache.values[number]
        )
        if weights.dtype != torch.float32 or not DecoderLayers.takes(own):
            return None
        made.append(own)
    return DecoderLayers(made, weights.layers[0].qkv.exact, PAGE_TOKENS) if made else None


@torch.inference_mode()
def _turns(weights: Weights, count: int) -> list[torch.Tensor]:
    """cos and sin of positions 0 to ``count`` - 1, (count, D) each, as the model's own module makes them; in pieces, as
    its way there is in FP32 and threefold."""
    like = torch.empty(0, dtype=weights.dtype, device=weights.device)
    places = torch.arange(count, device=weights.device)
    pieces = [weights.rotary(like, piece.expand(3, -1)) for piece in places.split(4096)]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


class DecodeStep:
    """The step for up to ``max_rows`` answers.

    Args:
        cache: its last page is nobody's. most_tokens: that one request may have there.
        splits: shares of a context; None: as many as are fastest for so many rows.
    """

    def __init__(
        self, weights: Weights, cache: KeyValueCache, max_rows: int, most_tokens: int, splits: int | None = None
    ) -> None:
        self.weights, self.cache, self.most_tokens, self.splits = weights, cache, most_tokens, splits
        self._sizes = sorted({min(1 << power, max_rows) for power in range(max_rows.bit_length() + 1)})
        device = weights.device
        width = pages_for(most_tokens) + 1
        self._nobody = cache.num_pages - 1
        self.ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._table = torch.full((max_rows, width), self._nobody, dtype=torch.int32, device=device)
        self._turns = _turns(weights, width * PAGE_TOKENS)
        self._heads = [weights.heads(layer) for layer in weights.layers]
        self._in_one_call, self._cache_at = panel_layers(weights, cache), cache.keys.data_ptr()
        self._recorded: dict[int, Recorded[torch.Tensor]] = {}
        self._pool = pool_of(device)
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )

    def load(self, requests: Sequence[Request]) -> None:
        """Lay requests, each with one token missing, into the rows, in order; the other rows are nobody's."""
        count, size = len(requests), self.rows_for(len(requests))
        device = self.ids.device
        numbers = torch.zeros(3, size, dtype=torch.int64)
        numbers[:, :count] = torch.tensor([(r.chooser.answer[-1], r.next_position, r.num_done) for r in requests]).T
        there = numbers.to(device)
        self.ids[:size], self._positions[:size], self._lengths[:size] = there[0], there[1], there[2]
        # Of a request only its own pages are read; a row of nobody counts on through the whole of its line.
        width = max(len(r.pages) for r in requests)
        table = torch.tensor([r.pages + [self._nobody] * (width - len(r.pages)) for r in requests], dtype=torch.int32)
        self._table[:count, :width] = table.to(device)
        self._table[count:size] = self._nobody

    def rows_for(self, count: int) -> int:
        """The number of rows that so many requests run in."""
        return next(size for size in self._sizes if size >= count)

    @torch.inference_mode()
    def run(self, count: int) -> torch.Tensor:
        """(count, V) logits of the rows' next tokens; the likeliest are their inputs now, in ``ids``."""
        size = self.rows_for(count)
        if size not in self._recorded:
            self._recorded[size] = self._record(size)
        return self._recorded[size]()[:count]

    def _record(self, size: int) -> Recorded[torch.Tensor]:
        # The call before a recording moves the state on. What it appends to the cache is appended again by the first
        # replay.
        state = (self.ids, self._positions, self._lengths)
        before = [part.clone() for part in state]
        recorded = Recorded(self.ids.device, self._pool, lambda: self._forward(size))
        for part, kept in zip(state, before, strict=True):
            part.copy_(kept)
        return recorded

    def _forward(self, size: int) -> torch.Tensor:
        weights = self.weights
        x = weights.embeddings(self.ids[:size])
        cos, sin = (turns.index_select(0, self._positions[:size]) for turns in self._turns)
        rotation = (cos, sin)
        if self._in_one_call is not None:
            assert self.cache.keys.data_ptr() == self._cache_at, "the layers have the addresses of another cache"
            x = self._in_one_call(x, rotation, self._table[:size], self._lengths[:size])
        else:
            x = self._layer_by_layer(x, rotation)
        logits = weights.head(rms_norm(x, weights.last_norm))
        advance(logits, self.ids[:size], self._positions[:size], self._lengths[:size])
        return logits

    def _layer_by_layer(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        weights, cache, size = self.weights, self.cache, len(x)
        splits = self.splits or splits_for(size, weights.num_kv_heads, self._processors, self.most_tokens)
        for number, (layer, heads) in enumerate(zip(weights.layers, self._heads, strict=True)):
            attended = paged_attention(
                layer.qkv(x, norm=layer.attention_norm),
                rotation,
                cache.keys[number],
                cache.values[number],
                self._table[:size],
                self._lengths[:size],
                heads,
                PAGE_TOKENS,
                splits,
            )
            x = layer.attention_out(attended, residual=x)
            x = layer.down(layer.gate_up(x, norm=layer.mlp_norm), residual=x)
        return x
