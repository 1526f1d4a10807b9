"""The one layout that the GPU kernels read: codes in the order of a tensor core's registers.

Made from the neutral codes when a model is loaded, never written to a file. ``mma.m16n8k16`` multiplies 16 x 16 weights
(operand A, a warp's registers a0..a3) with 16 inputs of 8 tokens (B). Lane l = 4 g + t, g = 0..7, t = 0..3, holds

    a0 row g, a1 row g + 8, at k-positions 2t, 2t+1        a2 row g, a3 row g + 8, at 2t+8, 2t+9

Which inputs stand at those positions is free as long as A and B agree. Here a lane's share of 32 inputs is 8
neighbours, so that a token's are one 16-byte load:

    k = 32 b + 8 t + 4 s + 2 p + e     b block of 32, s which of its two products, p = 0: a0 a1, 1: a2 a3, e even, odd

    4 bits   words (out/16, in/64, 32 lanes, 4): a lane's 16 bytes are two blocks; word 2b + s; register a_i, i = 2p + r
             (r = 0: row g, 1: row g + 8), at bits 4i (e = 0) and 16 + 4i (e = 1):  (word >> 4i) & 0x000f000f is a pair
    8 bits   words (out/16, in/32, 32 lanes, 4): word 2s + p; bytes 2r + e
    scales   (out/16, groups, 8, 2): of rows g and g + 8 of a tile side by side

Codes are stored with 2^(b-1) added. A warp reads 512 contiguous bytes, a row tile is contiguous along ``in``. With 4
bits ``in`` is filled up to a multiple of 64 with codes that mean 0. No product mixes two blocks of 32, so any group of
a multiple of 32 works.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.scheme import QuantizedTensor

TILE = 16
"""Rows of a tile."""
BLOCK = 32
"""Inputs that one product's lanes share; groups are multiples of it."""
_ELEMENTS = 1 << 26
SLAB = 64
"""Inputs that a lane's 16 bytes reach over, with 4 bits."""
_SHIFTS = {
    4: torch.tensor([[[4 * (2 * p + r) + 16 * e for e in (0, 1)] for r in (0, 1)] for p in (0, 1)]),
    8: torch.tensor([[8 * (2 * r + e) for e in (0, 1)] for r in (0, 1)]),
}
"""By bits: where in a word a code of (p, r, e), or of (r, e), begins."""


@dataclass(frozen=True)
class PackedLinear:
    """A weight for ``low_bit_linear``.

    Args:
        words: int32 as drawn above. scale: (out/16, groups, 8, 2) BF16, or FP32 where BF16 cannot hold the scales.
        dense: (out, in) BF16 copy for many tokens, or None.
    """

    words: torch.Tensor
    scale: torch.Tensor
    num_bits: int
    group_size: int
    out_features: int
    in_features: int
    dense: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of everything that is kept."""
        kept = (self.words, self.scale, *([] if self.dense is None else [self.dense]))
        return sum(tensor.nbytes for tensor in kept)

    @property
    def device(self) -> torch.device:
        return self.words.device


def has_kernel(tensor: QuantizedTensor) -> bool:
    """Whether ``pack_linear`` takes a weight."""
    out_features, in_features = tensor.shape
    group = in_features // tensor.scale.shape[1]
    return tensor.scheme.num_bits in (4, 8) and out_features % TILE == 0 and group % BLOCK == 0


def pack_linear(tensor: QuantizedTensor, device: torch.device | str = "cpu", keep_bf16: bool = False) -> PackedLinear:
    """Codes and scales of a weight in the kernels' layout.

    Args:
        tensor: W4 or W8; out a multiple of 16, groups of a multiple of 32 inputs (per channel: one group a row).
        keep_bf16: keep bf16(q s) beside it, which is faster for many tokens and takes four times the memory.

    Raises:
        ConfigError: another width, shape or group size.
    """
    out_features, in_features = tensor.shape
    bits, group = tensor.scheme.num_bits, in_features // tensor.scale.shape[1]
    if not has_kernel(tensor):
        raise ConfigError(
            f"a {out_features} x {in_features} weight of {bits} bits in groups of {group} has no fast kernel; expected "
            f"4 or 8 bits, out_features a multiple of {TILE} and groups of a multiple of {BLOCK}"
        )
    codes, scale = tensor.codes.to(device), tensor.scale.to(device)
    dense = dequantize(codes, scale) if keep_bf16 else None
    exact = scale.dtype == torch.bfloat16 or bool((scale.to(torch.bfloat16).to(scale.dtype) == scale).all())
    tiled = scale.to(torch.bfloat16 if exact else torch.float32).view(out_features // TILE, 2, 8, -1)
    # A million rows of four thousand would be 16 GB of int32 on the way.
    parts = codes.split(max(TILE, _ELEMENTS // in_features // TILE * TILE))
    words = torch.cat([_words4(part) if bits == 4 else _words8(part) for part in parts])
    scales = tiled.permute(0, 3, 2, 1).contiguous()
    if words.is_cuda:
        # Kernels fetch weights before they wait for what was launched before them (``starts_early``).
        torch.cuda.synchronize(words.device)
    return PackedLinear(words, scales, bits, group, out_features, in_features, dense)


def _words4(codes: torch.Tensor) -> torch.Tensor:
    missing = -codes.shape[1] % SLAB
    stored = torch.nn.functional.pad(codes, (0, missing)).to(torch.int32) + 8
    # tile r g | slab b t s p e -> tile slab g t b s | p r e
    parts = stored.view(codes.shape[0] // TILE, 2, 8, -1, 2, 4, 2, 2, 2).permute(0, 3, 2, 5, 4, 6, 7, 1, 8)
    return _joined(parts, _SHIFTS[4])


def _words8(codes: torch.Tensor) -> torch.Tensor:
    stored = codes.to(torch.int32) + 128
    # tile r g | block t s p e -> tile block g t s p | r e
    parts = stored.view(codes.shape[0] // TILE, 2, 8, -1, 4, 2, 2, 2).permute(0, 3, 2, 4, 5, 6, 1, 7)
    return _joined(parts, _SHIFTS[8])


def _joined(parts: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(tiles, slabs, 32, 4) int32: the last axes of ``parts``, as many as ``shift`` has, at their bits of a word."""
    shifted = parts << shift.to(parts.device, torch.int32)
    # Bits do not overlap, so a sum that wraps is their union.
    words = shifted.flatten(-shift.ndim).sum(-1, dtype=torch.int32)
    return words.reshape(words.shape[0], words.shape[1], 32, 4).contiguous()


def unpack_codes(packed: PackedLinear) -> torch.Tensor:
    """(out, in) int8: the neutral codes again."""
    words, tiles, lanes = packed.words, packed.out_features // TILE, (8, 4)
    if packed.num_bits == 4:
        shift = _SHIFTS[4].to(words.device)
        stored = (words.view(tiles, -1, *lanes, 2, 2, 1, 1, 1) >> shift) & 15
        # tile slab g t b s p r e -> tile r g slab b t s p e
        codes = stored.permute(0, 7, 2, 1, 4, 3, 5, 6, 8) - 8
    else:
        # As bytes, a quarter of what words would move. Tile block g t s p r e -> tile r g block t s p e
        stored = words.view(torch.uint8).view(tiles, -1, *lanes, 2, 2, 2, 2).permute(0, 6, 2, 1, 3, 4, 5, 7)
        codes = (stored ^ 128).view(torch.int8)
    return codes.reshape(packed.out_features, -1)[:, : packed.in_features].to(torch.int8)


def row_scales(packed: PackedLinear) -> torch.Tensor:
    """(out, groups): the scales as they came."""
    return packed.scale.permute(0, 3, 2, 1).reshape(packed.out_features, -1)
