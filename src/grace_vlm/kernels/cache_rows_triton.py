"""``cache_rows`` in Triton: numbers of a new token as the cache keeps them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_kept(x, kept: tl.constexpr):
    """FP32 numbers, rounded before to the model's dtype, in the dtype of the cache."""
    if kept == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        # To E4M3's own numbers by hand, half to even, so that the cast has nothing left to round: Triton's interpreter
        # loses carries there.
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        # Below 2^-6 they are multiples of 2^-9, which are the last places of numbers near 2^14.
        small = (x + 24576.0) - 24576.0
        x = tl.where(tl.abs(x) < 0.015625, small, tl.where(x == x, rounded, x))
    return x.to(kept)
