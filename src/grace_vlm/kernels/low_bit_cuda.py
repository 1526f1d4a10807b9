"""Launches of ``low_bit_linear.cu`` and ``low_bit_tiles.cu``, and what they are compiled for.

A setup is what was measured for the GPU, the layer and the number of tokens (``tuned.py``), else a rule's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from grace_vlm.kernels import aligned
from grace_vlm.kernels.fragments import SLAB, TILE, PackedLinear
from grace_vlm.kernels.nvrtc import load_kernel
from grace_vlm.kernels.tuned import Fields, tuned

FEW_TOKENS = 64
"""Up to here weights are what a layer waits for."""


@dataclass(frozen=True)
class Setup:
    """How ``low_bit_linear.cu`` is compiled for a number of tokens: tokens of a block in eights, row tiles of a warp,
    warps, slabs on their way."""

    eights: int
    rows: int
    warps: int
    depth: int

    def grid(self, num_tokens: int, num_tiles: int) -> tuple[int, int, int]:
        """Blocks along rows and tokens."""
        return -(-num_tiles // self.rows), -(-num_tokens // (8 * self.eights)), 1


def setup_of(num_tokens: int, num_slabs: int) -> Setup:
    """By rule, for GPUs that nobody measured: registers for the tokens first, then as many weights on their way."""
    eights = next(n for n in (1, 2, 4, 8) if num_tokens <= 8 * n or n == 8)
    setup = {1: Setup(1, 1, 8, 4), 2: Setup(2, 1, 8, 4), 4: Setup(4, 2, 4, 4), 8: Setup(8, 2, 4, 2)}[eights]
    warps = max(1, min(setup.warps, num_slabs))
    return Setup(eights, setup.rows, warps, min(setup.depth, -(-num_slabs // warps)))


def defines_of(packed: PackedLinear, setup: Setup, is_half: bool, norm: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_linear.cu``."""
    return {
        **_layout_defines(packed, is_half),
        "NT": setup.eights,
        "ROWS": setup.rows,
        "WARPS": setup.warps,
        "DEPTH": setup.depth,
        "EARLY": setup.eights <= 2,
        "NORM": norm,
        "SILU": silu,
    }


@dataclass(frozen=True)
class TileSetup:
    """How ``low_bit_tiles.cu`` is compiled: tokens of a block, pieces of 64 rows of a warpgroup, warpgroups that share
    rows, warpgroups that share inputs, and blocks that share them too."""

    tokens: int
    tall: int = 1
    groups: int = 1
    split: int = 1
    spread: int = 1

    STAGES: ClassVar = 4
    """Slabs of tokens in shared memory."""

    def __post_init__(self) -> None:
        # A place in shared memory belongs to one warpgroup, which gives it back when it has begun with its next slab:
        # two would take each other's, and a single place each would be waited for in a circle.
        assert self.STAGES % (2 * self.split) == 0
        assert self.tokens % (8 * self.spread) == 0

    def grid(self, num_tokens: int, num_tiles: int) -> tuple[int, int, int]:
        """Blocks along rows, tokens and inputs."""
        return -(-num_tiles // (4 * self.tall * self.groups)), -(-num_tokens // self.tokens), self.spread

    @property
    def threads(self) -> int:
        """Of a block: one more warpgroup brings the tokens."""
        return 128 * (1 + self.groups * self.split)

    def shared_bytes(self, silu: bool) -> int:
        """Of a block, as the text counts them, and what it takes to begin at a multiple of 1,024."""
        sums = 4 * self.groups * self.tall * 64 * self.tokens if self.split * self.spread > 1 else 0
        lines = 2 * self.groups * self.tokens // self.spread * ((32 if silu else 64) * self.tall + 8)
        return max(2 * self.STAGES * 64 * self.tokens, sums + lines) + 1024


def tile_setup_of(num_tokens: int, out_features: int, num_processors: int) -> TileSetup:
    """By rule: the largest blocks of which there are enough for every multiprocessor."""
    tokens = next((n for n in (32, 64) if num_tokens <= n), 128)
    large = [TileSetup(128, 2, 2), TileSetup(128, 1, 2)] if tokens == 128 else []
    for setup in (*large, TileSetup(tokens, 1, 1, 2), TileSetup(tokens, 1, 1, 2, 2)):
        if math.prod(setup.grid(num_tokens, out_features // TILE)) >= num_processors * 7 // 8:
            return setup
    return TileSetup(tokens, 1, 1, 2, 4)


def tile_defines_of(packed: PackedLinear, setup: TileSetup, is_half: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_tiles.cu``."""
    return {
        **_layout_defines(packed, is_half),
        "TOKENS": setup.tokens,
        "TALL": setup.tall,
        "WGS": setup.groups,
        "SPLIT": setup.split,
        "SPREAD": setup.spread,
        "STAGES": setup.STAGES,
        "DEPTH": 4 if setup.tall == 1 and packed.num_bits == 4 else 2,
        # Registers for two where both their tokens' sums fit.
        "BLOCKS": 2 if setup.threads == 256 and setup.tokens <= 64 and setup.tall == 1 else 1,
        "SILU": silu,
    }


def _layout_defines(packed: PackedLinear, is_half: bool) -> dict[str, int]:
    """What both texts must know of a weight."""
    return {
        "BITS": packed.num_bits,
        "HALF": is_half,
        "GROUP": 0 if packed.group_size == packed.in_features else packed.group_size,
        "WIDE": packed.scale.dtype == torch.float32,
        "TAIL": packed.in_features % SLAB != 0,
    }


def setup_for(num_tokens: int, packed: PackedLinear, with_tiles: bool) -> Setup | TileSetup | None:
    """What was measured for this GPU, such a layer and so many tokens, else what a rule says; None: torch is to do it.

    Args:
        with_tiles: the rule may say warpgroups, where the GPU has them and tokens are more than a few. They are not the
            rule until a GPU has run them to the end.
    """
    is_exact = packed.scale.dtype == torch.bfloat16
    layer = (packed.num_bits, packed.out_features, packed.in_features)
    return _setup_for(num_tokens, *layer, is_exact, packed.device, with_tiles)


@functools.cache
def _setup_for(
    num_tokens: int, num_bits: int, out: int, inputs: int, is_exact: bool, device: torch.device, with_tiles: bool
) -> Setup | TileSetup | None:
    fields = tuned(torch.cuda.get_device_name(device), num_bits, out, inputs, num_tokens)
    has_tiles = is_exact and torch.cuda.get_device_capability(device) == (9, 0)
    if fields is not None and ("tokens" not in fields or has_tiles):
        return read_setup(fields)
    if has_tiles and with_tiles and num_tokens > 16:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return tile_setup_of(num_tokens, out, processors)
    return setup_of(num_tokens, -(-inputs // SLAB)) if num_tokens <= FEW_TOKENS else None


def read_setup(fields: Fields) -> Setup | TileSetup | None:
    """A setup as ``tuned.json`` has it."""
    if not fields:
        return None
    return Setup(**fields) if "eights" in fields else TileSetup(**fields)


def run_few(
    setup: Setup,
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """(tokens, out') of contiguous (tokens, in) inputs; as ``low_bit_linear``, ``norm`` is (weight, epsilon)."""
    tokens, tiles = x.shape[0], packed.out_features // TILE
    defines = defines_of(packed, setup, x.dtype == torch.float16, norm is not None, silu)
    kernel = load_kernel("low_bit_linear.cu", "low_bit_linear", _hashable(defines), x.get_device())
    out = torch.empty(tokens, packed.out_features // (2 if silu else 1), dtype=x.dtype, device=x.device)
    weight, epsilon = (None, 0.0) if norm is None else norm
    others = [_like(tensor, x) for tensor in (weight, bias, residual)]
    kernel(
        setup.grid(tokens, tiles),
        32 * setup.warps,
        [packed.words, packed.scale, x, *others, out, tokens, tiles, packed.in_features, epsilon],
    )
    return out


def run_many(
    setup: TileSetup,
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """As ``run_few``; scales must be BF16."""
    assert packed.scale.dtype == torch.bfloat16
    tokens, tiles = x.shape[0], packed.out_features // TILE
    defines = tile_defines_of(packed, setup, x.dtype == torch.float16, silu)
    kernel = load_kernel("low_bit_tiles.cu", "low_bit_tiles", _hashable(defines), x.get_device())
    out = torch.empty(tokens, packed.out_features // (2 if silu else 1), dtype=x.dtype, device=x.device)
    others = [_like(tensor, x) for tensor in (bias, residual)]
    kernel(
        setup.grid(tokens, tiles),
        setup.threads,
        [packed.words, packed.scale, x, *others, out, tokens, tiles, packed.in_features],
        setup.shared_bytes(silu),
    )
    return out


def _hashable(defines: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, value in defines.items())


def _like(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """As the kernel reads it: in the dtype of x."""
    return None if tensor is None else aligned(tensor.to(x.dtype))
