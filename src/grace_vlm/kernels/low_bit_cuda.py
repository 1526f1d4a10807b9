"""Launches of ``low_bit_linear.cu`` (also for plain weights) and ``low_bit_tiles.cu``, and what they are compiled for.

A setup is what was measured for the GPU, the layer and the number of tokens (``tuned.py``), else a rule's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from grace_vlm.kernels import aligned
from grace_vlm.kernels.fragments import SLAB, TILE, PackedLinear
from grace_vlm.kernels.nvrtc import load_kernel
from grace_vlm.kernels.tuned import FEW_TOKENS, Fields, tuned

MOST_TOKENS = 1 << 20
"""Of a launch of tiles: a grid has 65,535 blocks along tokens."""


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


def plain_setup_of(num_tokens: int, out_features: int, in_features: int) -> Setup:
    """The same for plain weights, from a sweep on an H100: a small layer has too few blocks to wait one by one."""
    eights, slabs = 1 if num_tokens <= 8 else 2, -(-in_features // SLAB)
    rows, depth = (2, 2) if out_features * in_features <= 1 << 23 else (1, 1)
    warps = max(1, min(16, slabs // depth))
    return Setup(eights, rows, warps, min(depth, slabs))


def defines_of(packed: PackedLinear, setup: Setup, is_half: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_linear.cu``."""
    return {**_layout_defines(packed, is_half), **_setup_defines(setup, silu)}


def plain_defines_of(in_features: int, setup: Setup, is_half: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_linear.cu`` for plain weights."""
    layout = {"BITS": 16, "HALF": is_half, "GROUP": 0, "WIDE": 0, "TAIL": in_features % SLAB != 0}
    return {**layout, **_setup_defines(setup, silu)}


def _setup_defines(setup: Setup, silu: bool) -> dict[str, int]:
    return {
        "NT": setup.eights,
        "ROWS": setup.rows,
        "WARPS": setup.warps,
        "DEPTH": setup.depth,
        "KEEP_INPUTS": setup.eights <= 2,
        "SILU": silu,
    }


@dataclass(frozen=True)
class TileSetup:
    """How ``low_bit_tiles.cu`` is compiled: tokens of a block, warpgroups of 64 rows each, warpgroups that share their
    inputs, and blocks that share them too. ``arranged``: another kernel lays the tokens out first
    (``low_bit_arrange.cu``), which pays where many blocks read them."""

    tokens: int
    groups: int = 1
    split: int = 1
    spread: int = 1
    arranged: bool = False

    OTHER_REGISTERS: ClassVar = 40
    """Of a thread that brings tokens."""

    def __post_init__(self) -> None:
        # A place in shared memory belongs to one warpgroup, which gives it back when it has begun with its next slab:
        # two would take each other's, and a single place each would be waited for in a circle.
        assert self.split in (1, 2)
        assert self.tokens % (8 * self.spread) == 0

    @property
    def stages(self) -> int:
        """Slabs of tokens in shared memory."""
        return 8 if self.tokens < 128 else 6

    @property
    def blocks(self) -> int:
        """Of a multiprocessor at a time: two where both their sums fit in its registers."""
        return 2 if self.threads == 256 and self.tokens < 256 else 1

    @property
    def registers(self) -> int:
        """Of a thread that multiplies: its share of what the others leave of 65,536."""
        at_first = 65536 // (self.threads * self.blocks) // 8 * 8
        workers = self.threads // 128 - 1
        return min(240, ((workers + 1) * min(at_first, 248) - self.OTHER_REGISTERS) // workers // 8 * 8)

    def grid(self, num_tokens: int, num_tiles: int) -> tuple[int, int, int]:
        """Blocks along rows, tokens and inputs."""
        return -(-num_tiles // (4 * self.groups)), -(-num_tokens // self.tokens), self.spread

    @property
    def threads(self) -> int:
        """Of a block: one more warpgroup brings the tokens."""
        return 128 * (1 + self.groups * self.split)

    def shared_bytes(self, silu: bool) -> int:
        """Of a block, as the text counts them, and what it takes to begin at a multiple of 1,024."""
        sums = 4 * self.groups * 64 * self.tokens if self.split * self.spread > 1 else 0
        lines = 2 * self.groups * self.tokens // self.spread * ((32 if silu else 64) + 8)
        return max(2 * self.stages * 64 * self.tokens, sums + lines) + 1024


def tile_setups(num_tokens: int) -> Iterator[TileSetup]:
    """All whose sums fit in registers and that are not twice as large as the tokens."""
    for tokens, groups, split, spread in itertools.product((32, 64, 128, 256), (1, 2, 3), (1, 2), (1, 2, 4)):
        if groups * split > {64: 3, 128: 3, 256: 2}.get(tokens, 4) or (tokens > 32 and tokens >= 2 * num_tokens):
            continue
        yield TileSetup(tokens, groups, split, spread)
        if tokens >= 128:
            yield TileSetup(tokens, groups, split, spread, arranged=True)


def tile_microseconds(
    setup: TileSetup, num_tokens: int, out_features: int, in_features: int, num_processors: int
) -> float:
    """What a layer takes on an H100, roughly: the numbers are of its 64 inputs of a block, from the sweep in
    docs/kernels.md. Products, decoding and copies of one multiprocessor overlap; the longest counts."""
    blocks = math.prod(setup.grid(num_tokens, out_features // TILE))
    slabs = -(-in_features // SLAB) / setup.spread
    copied = 0.0 if setup.arranged else 0.005 * setup.tokens
    busy = max(0.0014 * setup.tokens * setup.groups, 0.14 * setup.groups, copied)
    turns, waves = -(-blocks // num_processors), -(-blocks // (num_processors * setup.blocks))
    inside = slabs * max(turns * busy, waves * 0.3 / setup.split)
    before = 1.5 + num_tokens * in_features * 2e-6 if setup.arranged else 0.0
    return before + inside + waves * {1: 2.5, 2: 4.0, 4: 5.8}[setup.spread]


@functools.lru_cache(maxsize=4096)
def tile_setup_of(num_tokens: int, out_features: int, in_features: int, num_processors: int) -> TileSetup:
    """By rule, for layers that nobody measured."""
    layer = (out_features, in_features, num_processors)
    return min(tile_setups(num_tokens), key=lambda setup: tile_microseconds(setup, num_tokens, *layer))


def tile_defines_of(packed: PackedLinear, setup: TileSetup, is_half: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_tiles.cu``."""
    return {
        **_layout_defines(packed, is_half),
        "TOKENS": setup.tokens,
        "WGS": setup.groups,
        "SPLIT": setup.split,
        "SPREAD": setup.spread,
        "STAGES": setup.stages,
        "DEPTH": 4 if packed.num_bits == 4 else 2,
        "BLOCKS": setup.blocks,
        "OWN": setup.registers,
        "OTHER": setup.OTHER_REGISTERS,
        "ARRANGED": setup.arranged,
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
        with_tiles: ``low_bit_tiles.cu`` may be used, where the GPU has warpgroups.
    """
    is_exact = packed.scale.dtype == torch.bfloat16
    layer = (packed.num_bits, packed.out_features, packed.in_features)
    return _setup_for(num_tokens, *layer, is_exact, packed.device, with_tiles)


@functools.lru_cache(maxsize=4096)
def _setup_for(
    num_tokens: int, num_bits: int, out: int, inputs: int, is_exact: bool, device: torch.device, with_tiles: bool
) -> Setup | TileSetup | None:
    fields = tuned(torch.cuda.get_device_name(device), num_bits, out, inputs, num_tokens)
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    has_tiles = with_tiles and is_exact and is_hopper and num_tokens <= MOST_TOKENS
    if fields is not None and ("tokens" not in fields or has_tiles):
        return read_setup(fields)
    if has_tiles and num_tokens > 16:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return tile_setup_of(num_tokens, out, inputs, processors)
    return setup_of(num_tokens, -(-inputs // SLAB)) if num_tokens <= FEW_TOKENS else None


def read_setup(fields: Fields) -> Setup | TileSetup | None:
    """A setup as ``tuned.json`` has it."""
    if not fields:
        return None
    if "eights" in fields:
        return Setup(**fields)
    sizes = {name: fields[name] for name in ("tokens", "groups", "split", "spread")}
    return TileSetup(**sizes, arranged=bool(fields["arranged"]))


def run_few(
    setup: Setup,
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """(tokens, out') of contiguous (tokens, in) inputs, as ``low_bit_linear``."""
    defines = defines_of(packed, setup, x.dtype == torch.float16, silu)
    shape = (packed.out_features, packed.in_features)
    return _run(setup, defines, x, (packed.words, packed.scale), shape, bias, residual, silu)


def run_plain(
    setup: Setup,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """As ``run_few`` with a contiguous (out, in) weight in the dtype of x; with ``silu`` its first half are gates."""
    out_features, in_features = weight.shape
    defines = plain_defines_of(in_features, setup, x.dtype == torch.float16, silu)
    return _run(setup, defines, x, (weight, None), (out_features, in_features), bias, residual, silu)


def _run(
    setup: Setup,
    defines: dict[str, int],
    x: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor | None],
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """``weight``: words and scale."""
    (out_features, in_features), tokens = shape, x.shape[0]
    tiles = out_features // TILE
    kernel = load_kernel("low_bit_linear.cu", "low_bit_linear", _hashable(defines), x.get_device())
    out = torch.empty(tokens, out_features // (2 if silu else 1), dtype=x.dtype, device=x.device)
    others = [_like(tensor, x) for tensor in (bias, residual)]
    kernel(setup.grid(tokens, tiles), 32 * setup.warps, [*weight, x, *others, out, tokens, tiles, in_features])
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
    given = _arranged(x, setup.tokens) if setup.arranged else x
    kernel(
        setup.grid(tokens, tiles),
        setup.threads,
        [packed.words, packed.scale, given, *others, out, tokens, tiles, packed.in_features],
        setup.shared_bytes(silu),
    )
    return out


def _arranged(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """(tokens, in) as ``low_bit_arrange.cu`` says, tokens up to a ``multiple``; what is behind the last is not set."""
    tokens, inputs = x.shape
    padded, slabs = -(-tokens // multiple) * multiple, -(-inputs // SLAB)
    out = torch.empty(slabs, padded, SLAB, dtype=x.dtype, device=x.device)
    layout = (("BITS", 4), ("HALF", 0), ("GROUP", 0), ("WIDE", 0), ("TAIL", 0))
    kernel = load_kernel("low_bit_arrange.cu", "low_bit_arrange", layout, x.get_device())
    kernel((-(-tokens * slabs * 2 // 256), 1, 1), 256, [x, out, tokens, padded, inputs])
    return out


def _hashable(defines: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(value)) for name, value in defines.items())


def _like(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """As the kernel reads it: in the dtype of x."""
    return None if tensor is None else aligned(tensor.to(x.dtype))
