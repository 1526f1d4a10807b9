"""AdamW whose two moments take one byte each: 2.03 bytes a weight where FP32 takes 8.

Both moments are stored on a logarithmic scale below the largest magnitude of their block of ``BLOCK`` elements, which
is FP32. Eight levels an octave, evenly spaced inside it, as in a floating-point number with three mantissa bits:

    v   codes 0..255             0, and 32 octaves below the largest v of the block; never 0 unless v is
    m   a sign and codes 0..127  0, and 16 octaves below the largest |m| of the block

The update is m / sqrt(v), so m needs as many octaves as sqrt(v). With fewer, a small m is rounded up to its lowest
level and divided by its true small sqrt(v): linear codes move single weights by thousands of times the rate
(docs/log.md).
What is too small for v is kept at its lowest level, where it can only make the update smaller.

**Rounding is stochastic.** With beta2 = 0.999 a step changes v by about 0.1 %, and half the distance of two levels is
3 to 6 %: round-to-nearest would leave v at its level for ever, even when the gradient falls to a tenth. A moment is
rounded up with the probability that makes its mean exact, by comparing with a threshold that is a hash of its index and
the step. So nothing is stored, a resumed run is exact, and the kernel repeats it bit for bit.

Only what is carried to the next step is rounded; this step's update uses the moments before rounding.
``kernels/adamw8.py`` does all tensors in one launch; here it is torch, in chunks, so that temporaries stay small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grace_vlm.kernels import runs_triton

BLOCK = 256
"""Elements of a tensor, in memory's order, that share the scales of their moments."""
MIN_ELEMENTS = 4096
"""Smaller tensors keep FP32 moments: they are norms and biases, a thousandth of the memory."""
LEVELS_M, LEVELS_V = 127, 255
_ONE_BITS = 0x3F800000
_SHIFT = 20
"""An FP32 number's mantissa has 23 bits; without the lower 20 three are left, eight levels an octave."""
_RANDOM = 1 << _SHIFT
_GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio, odd."""
_WORD = 0xFFFFFFFF
_CHUNK_BLOCKS = 1024


@dataclass(frozen=True)
class Rule:
    """Numbers of one step that all tensors share. ``of`` makes them from AdamW's.

    Args:
        inverse_root_c2: 1 / sqrt(1 - beta2^n). rate_factor: of the peak rate. rate_factor_c1: that / (1 - beta1^n).
        turn: what the step adds to an index before it is hashed, mod 2^32.
    """

    beta1: float
    beta2: float
    epsilon: float
    inverse_root_c2: float
    rate_factor: float
    rate_factor_c1: float
    turn: int

    @classmethod
    def of(cls, beta1: float, beta2: float, epsilon: float, step: int, rate_factor: float) -> Rule:
        """For 0-based ``step``."""
        n = step + 1
        c1, c2 = 1.0 - beta1**n, 1.0 - beta2**n
        return cls(beta1, beta2, epsilon, c2**-0.5, rate_factor, rate_factor / c1, n * _GOLDEN & _WORD)


@dataclass(frozen=True)
class ByteMoments:
    """The moments of one tensor.

    Args:
        m, v: uint8, the tensor's shape. In ``m`` bit 7 is the sign.
        scale: (2, blocks) FP32, the largest |m| and v of each block.
    """

    m: torch.Tensor
    v: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def zeros(cls, like: torch.Tensor) -> ByteMoments:
        blocks = -(-like.numel() // BLOCK)
        m, v = (torch.zeros(like.shape, dtype=torch.uint8, device=like.device) for _ in range(2))
        return cls(m, v, torch.zeros(2, blocks, dtype=torch.float32, device=like.device))


def thresholds(first_block: int, num_blocks: int, turn: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(for m, for v), (num_blocks, BLOCK) int64 in [0, 2^20): what the lower bits of a moment are compared with."""
    index = torch.arange(first_block * BLOCK, (first_block + num_blocks) * BLOCK, device=device) + turn & _WORD
    # MurmurHash3's finalizer: every bit of the index moves every bit of the hash.
    index = (index ^ (index >> 16)) * 0x85EBCA6B & _WORD
    index = (index ^ (index >> 13)) * 0xC2B2AE35 & _WORD
    found = (index ^ (index >> 16)).view(num_blocks, BLOCK)
    other = (found << 16 | found >> 16) & _WORD
    return other >> 32 - _SHIFT, found >> 32 - _SHIFT


def _lowest(levels: int) -> int:
    """The bits of the ratio that code 1 stands for."""
    return _ONE_BITS - (levels - 1 << _SHIFT)


def decode(codes: torch.Tensor, scale: torch.Tensor, levels: int) -> torch.Tensor:
    """Magnitudes of codes (n, BLOCK) in 0..levels, FP32; ``scale``: (n,)."""
    bits = _ONE_BITS - (levels - codes.to(torch.int32) << _SHIFT)
    return torch.where(codes > 0, bits.view(torch.float32), 0.0) * scale.unsqueeze(1)


def encode(x: torch.Tensor, threshold: torch.Tensor, levels: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """((n, BLOCK) int64 codes in 0..levels, (n,) FP32 scale) of magnitudes (n, BLOCK).

    Args:
        threshold: (n, BLOCK) as from ``thresholds``.
        keep: what is below the lowest level goes there, if it is not 0; else it is rounded there or to 0.
    """
    scale = x.amax(dim=1)
    # One division a block. Below the smallest normal number its inverse would be infinite.
    ratio = x * torch.where(scale >= 2.0**-126, 1.0 / scale, 0.0).unsqueeze(1)
    above = ratio.view(torch.int32).to(torch.int64) - _lowest(levels)
    low = ratio * _RANDOM_OVER_LOWEST > threshold if not keep else x > 0
    codes = torch.where(above < 0, low.to(torch.int64), 1 + (above + threshold >> _SHIFT))
    return codes.clamp_max(levels), scale


_RANDOM_OVER_LOWEST = _RANDOM * 2.0**16 / 1.25
"""2^20 over the ratio of m's lowest level, which is 1.25 x 2^-16."""


@torch.no_grad()
def adamw8_(
    master: torch.Tensor,
    gradient: torch.Tensor,
    moments: ByteMoments,
    rule: Rule,
    rate: float,
    decay: float,
    first_block: int = 0,
    skip: torch.Tensor | None = None,
) -> None:
    """One AdamW update of one tensor, in place; the reference of ``kernels/adamw8.py``.

    Args:
        master, gradient: FP32, contiguous, of one shape.
        rate: the peak rate. decay: weight decay.
        first_block: blocks of the tensors before this one: no two elements share a threshold.
        skip: FP32 scalar on the same device; 1 leaves every byte as it was.
    """
    goes = None if skip is None else skip != 1
    # As FP32 numbers, because the kernel has them so.
    size, shrink = (
        float(torch.tensor(a) * torch.tensor(b))
        for a, b in ((rate, rule.rate_factor_c1), (rate * decay, rule.rate_factor))
    )
    flat = [x.view(-1) for x in (master, gradient, moments.m, moments.v)]
    for first in range(0, moments.scale.shape[1], _CHUNK_BLOCKS):
        scales = moments.scale[:, first : first + _CHUNK_BLOCKS]
        blocks = scales.shape[1]
        w, g, m_codes, v_codes = (_blocks(x[first * BLOCK : (first + blocks) * BLOCK], blocks) for x in flat)
        sign = torch.where(m_codes >= 128, -1.0, 1.0)
        m = decode(m_codes & 127, scales[0], LEVELS_M) * sign * rule.beta1 + g * (1.0 - rule.beta1)
        v = decode(v_codes, scales[1], LEVELS_V) * rule.beta2 + g * g * (1.0 - rule.beta2)
        # By way of FP64, because torch's FP32 square root on a CPU is not IEEE's.
        root = v.double().sqrt().float()
        update = m / (root * rule.inverse_root_c2 + rule.epsilon)
        for_m, for_v = thresholds(first_block + first, blocks, rule.turn, master.device)
        new_m, m_scale = encode(m.abs(), for_m, LEVELS_M, keep=False)
        new_v, v_scale = encode(v, for_v, LEVELS_V, keep=True)
        new = (w - (w * shrink + update * size), new_m + 128 * (m < 0), new_v, torch.stack([m_scale, v_scale]))
        old = (w, m_codes, v_codes, scales)
        kept = new if goes is None else [torch.where(goes, a, b) for a, b in zip(new, old, strict=True)]
        for x, values in zip((flat[0], *flat[2:]), kept, strict=False):
            part = x[first * BLOCK : (first + blocks) * BLOCK]
            part.copy_(values.reshape(-1)[: part.numel()])
        scales.copy_(kept[3])


def _blocks(part: torch.Tensor, blocks: int) -> torch.Tensor:
    """(blocks, BLOCK), the end filled with zeros."""
    missing = blocks * BLOCK - part.numel()
    return (torch.nn.functional.pad(part, (0, missing)) if missing else part).view(blocks, BLOCK)


class AdamW8:
    """The tensors with byte moments of one run.

    Args:
        groups: ((name, master) of each tensor, peak rate, weight decay) of each group; contiguous FP32 masters.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[tuple[str, torch.Tensor]], float, float]],
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        self._adam = (beta1, beta2, epsilon)
        self._members = [(name, p, rate, decay) for members, rate, decay in groups for name, p in members]
        self._moments = {name: ByteMoments.zeros(p) for name, p, _, _ in self._members}
        self._table: Any = None
        self._table_of: list[int] = []

    @torch.no_grad()
    def step(self, step: int, rate_factor: float, skip: torch.Tensor | None = None) -> None:
        """One update from the masters' ``.grad`` at 0-based ``step``; a tensor without a gradient is left alone."""
        rule = Rule.of(*self._adam, step, rate_factor)
        gradients = [p.grad for _, p, _, _ in self._members]
        present = [g for g in gradients if g is not None]
        if len(present) == len(gradients) and runs_triton(*present):
            self._launch(present, rule, skip)
            return
        first_block = 0
        for (name, p, rate, decay), gradient in zip(self._members, gradients, strict=True):
            moments = self._moments[name]
            if gradient is not None:
                adamw8_(p.detach(), gradient, moments, rule, rate, decay, first_block, skip)
            first_block += moments.scale.shape[1]

    def _launch(self, gradients: list[torch.Tensor], rule: Rule, skip: torch.Tensor | None) -> None:
        from grace_vlm.kernels.adamw8 import MomentTable

        # Gradients may be other tensors than a step ago; to ask costs the host less than a launch.
        where = [g.data_ptr() for g in gradients]
        if where != self._table_of:
            rows = []
            for (name, p, rate, decay), gradient in zip(self._members, gradients, strict=True):
                moments = self._moments[name]
                rows.append((p.detach(), gradient, moments.m, moments.v, moments.scale, rate, decay))
            self._table, self._table_of = MomentTable.of(rows), where
        self._table.step(**dataclasses.asdict(rule), skip=skip)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``<name>#m``, ``#v``, ``#scale``, the moments themselves."""
        return {
            f"{name}#{field.name}": getattr(moments, field.name)
            for name, moments in self._moments.items()
            for field in dataclasses.fields(moments)
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore ``state_dict``, in place; other tensors of ``state`` are not looked at."""
        for key, own in self.state_dict().items():
            own.copy_(state[key])
