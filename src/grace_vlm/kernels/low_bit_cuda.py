"""Launches of ``low_bit_linear.cu`` and ``low_bit_tiles.cu``, and what they are compiled for.

A setup is what was measured for the GPU, the layer and the number of tokens (``tuned.py``), else a rule's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from grace_vlm.kernels.fragments import SLAB, TILE, PackedLinear
from grace_vlm.kernels.nvrtc import load_kernel
from grace_vlm.kernels.tuned import tuned


@dataclass(frozen=True)
class Setup:
    """How ``low_bit_linear.cu`` is compiled for a number of tokens: tokens of a block in eights, row tiles of a warp,
    warps, slabs on their way."""

    eights: int
    rows: int
    warps: int
    depth: int

    def grid(self, num_tokens: int, num_tiles: int) -> tuple[int, int]:
        """Blocks along rows and tokens."""
        return -(-num_tiles // self.rows), -(-num_tokens // (8 * self.eights))


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
    """How ``low_bit_tiles.cu`` is compiled: tokens of a block, and warpgroups, of 64 rows each."""

    tokens: int
    warpgroups: int

    def grid(self, num_tokens: int, num_tiles: int) -> tuple[int, int]:
        """Blocks along rows and tokens."""
        return -(-num_tiles // (4 * self.warpgroups)), -(-num_tokens // self.tokens)


def tile_setup_of(num_tokens: int, out_features: int, num_processors: int) -> TileSetup:
    """By rule: the largest blocks of which there are enough for every multiprocessor."""
    for setup in (TileSetup(128, 2), TileSetup(128, 1), TileSetup(64, 1)):
        blocks = -(-out_features // (64 * setup.warpgroups)) * -(-num_tokens // setup.tokens)
        if blocks >= num_processors:
            return setup
    return TileSetup(64, 1)


def tile_defines_of(packed: PackedLinear, setup: TileSetup, is_half: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_tiles.cu``."""
    return {
        **_layout_defines(packed, is_half),
        "TOKENS": setup.tokens,
        "WGS": setup.warpgroups,
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


def few_setup(num_tokens: int, packed: PackedLinear) -> Setup:
    """For up to 64 tokens at a time."""
    return _few_setup(num_tokens, packed.num_bits, packed.out_features, packed.in_features, packed.device)


@functools.cache
def _few_setup(num_tokens: int, num_bits: int, out: int, inputs: int, device: torch.device) -> Setup:
    fields = tuned(torch.cuda.get_device_name(device), num_bits, out, inputs, num_tokens)
    return Setup(**fields) if fields and "eights" in fields else setup_of(num_tokens, -(-inputs // SLAB))


def many_setup(num_tokens: int, packed: PackedLinear, by_rule: bool) -> TileSetup | None:
    """For more tokens than that, as measured, else by rule if one is wanted; None: torch is to do it."""
    return _many_setup(num_tokens, packed.num_bits, packed.out_features, packed.in_features, packed.device, by_rule)


@functools.cache
def _many_setup(
    num_tokens: int, num_bits: int, out: int, inputs: int, device: torch.device, by_rule: bool
) -> TileSetup | None:
    fields = tuned(torch.cuda.get_device_name(device), num_bits, out, inputs, num_tokens)
    if fields and "tokens" in fields:
        return TileSetup(**fields)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return tile_setup_of(num_tokens, out, processors) if by_rule else None


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
        128 * setup.warpgroups,
        [packed.words, packed.scale, x, *others, out, tokens, tiles, packed.in_features],
    )
    return out


def _hashable(defines: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, value in defines.items())


def _like(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """As the kernel reads it: in the dtype of x, without gaps."""
    return None if tensor is None else tensor.to(x.dtype).contiguous()
