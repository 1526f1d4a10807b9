"""Setups that were measured on a GPU: data in ``tuned.json``, written by ``benchmarks/tune_low_bit.py``.

    {GPU's name: {"w4 4096x2048": {"8": {"eights": 1, ...}, "128": {"tokens": 64, ...}, "256": {}}}}

Under a number of tokens stands what won for them: the fields of ``Setup`` or ``TileSetup``, or nothing where torch on
bf16(q s) did. A layer that nobody measured may take a ``Setup`` that won for one of about its size. Everything else has
rules (``low_bit_cuda.py``).
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

FILE = Path(__file__).with_name("tuned.json")
Fields = dict[str, int]
FEW_TOKENS = 64
"""Up to here weights are what a layer waits for."""


@functools.cache
def _measured(gpu: str, num_bits: int) -> list[tuple[float, float, dict[int, Fields]]]:
    """(log2 out, log2 in, what won by tokens) of each layer that was measured."""
    layers = json.loads(FILE.read_text(encoding="utf-8")).get(gpu, {})
    found = []
    for name, won in layers.items():
        bits, shape = name.split()
        if bits == f"w{num_bits}":
            out, inputs = (math.log2(int(side)) for side in shape.split("x"))
            found.append((out, inputs, {int(tokens): fields for tokens, fields in won.items()}))
    return found


@functools.lru_cache(maxsize=4096)
def tuned(gpu: str, num_bits: int, out_features: int, in_features: int, num_tokens: int) -> Fields | None:
    """What won for such a layer and so many tokens; None: nobody measured anything near.

    For few tokens weights are what a layer waits for: what won for some holds for fewer, and for layers whose sides are
    within a factor of two. For many, and for tiles, it hangs on how blocks fill the GPU: it holds for that layer alone,
    down to three quarters of the tokens.
    """
    out, inputs = math.log2(out_features), math.log2(in_features)
    is_few = num_tokens <= FEW_TOKENS
    near = [(max(abs(a - out), abs(b - inputs)), won) for a, b, won in _measured(gpu, num_bits)]
    for distance, won in sorted(near, key=lambda one: one[0]):
        own = min((tokens for tokens in won if tokens >= num_tokens), default=None)
        if own is None or distance > 1 or not (own <= FEW_TOKENS if is_few else 3 * own <= 4 * num_tokens):
            continue
        if distance == 0 or (is_few and "eights" in won[own]):
            return won[own]
    return None
