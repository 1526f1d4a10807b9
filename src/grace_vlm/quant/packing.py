"""Integer layouts of codes, named and drawn. Each pair is an exact inverse.

Codes are offset binary, u = q + 2^(b-1), in int32 words; only 4 and 8 bits have layouts that runtimes read (3 and 2
bits are studied as int8 codes).

``rows`` (compressed-tensors ``pack-quantized``, MLX): along in_features, lowest bits first.

    word j of a row, 4 bits:   bits 31..28  27..24  ...   7..4    3..0
                               column 8j+7    8j+6  ...   8j+1      8j
    codes -8 -7 -6 -5 -4 -3 -2 -1 in columns 8j..8j+7 give the word 0x76543210.
    8 bits: byte k of word j is column 4j+k.

``columns`` (GPTQ): the same words along in_features, but transposed: (in * b / 32, out), word row r holds the inputs
8r..8r+7 of one output.

``interleaved`` (AutoAWQ GEMM, 4 bits): transposed, and along out_features: (in, out / 8).

    word c of an input:        bits 31..28  27..24  23..20  19..16  15..12  11..8    7..4    3..0
                               output 8c+7    8c+5    8c+3    8c+1    8c+6   8c+4    8c+2      8c
"""

from __future__ import annotations

import torch

from grace_vlm.errors import FormatError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble k of an ``interleaved`` word is output 8c + AWQ_ORDER[k]."""
_TILE_ROWS = 1024
"""Rows transposed at once: keeps the temporaries of a large layer out of memory's way."""


def codes_per_word(num_bits: int) -> int:
    """Codes in an int32 word; ``FormatError`` for widths that no packed layout holds."""
    if num_bits not in (4, 8):
        raise FormatError(f"no packed layout holds {num_bits}-bit codes; expected 4 or 8 bits")
    return 32 // num_bits


def to_unsigned(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int8 codes -> uint8 offset binary, same shape; ``FormatError`` if a code has more bits."""
    offset = 1 << (num_bits - 1)
    if codes.numel() and num_bits < 8:
        low, high = codes.aminmax()
        if int(low) < -offset or int(high) >= offset:
            raise FormatError(f"codes outside the {num_bits}-bit range; expected [-{offset}, {offset - 1}]")
    # As bytes, adding 128 or 8 modulo 256 is right for negative codes too.
    return codes.contiguous().view(torch.uint8) + offset


def to_signed(unsigned: torch.Tensor, num_bits: int) -> torch.Tensor:
    """uint8 offset binary -> int8 codes, same shape."""
    return (unsigned - (1 << (num_bits - 1))).view(torch.int8)


def _pair(unsigned: torch.Tensor) -> torch.Tensor:
    """(..., n) nibbles -> (..., n / 2) bytes, the earlier one in the low half."""
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def _unpair(packed: torch.Tensor) -> torch.Tensor:
    """(..., n / 2) bytes -> (..., n) nibbles."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _whole_words(name: str, size: int, per_word: int) -> None:
    if size % per_word:
        raise FormatError(f"{name} {size} is not a multiple of {per_word}, the codes of a word")


def _check_words(words: torch.Tensor, axis: int, num_bits: int, size: int, what: str) -> None:
    held = words.shape[axis] * codes_per_word(num_bits)
    if held != size:
        raise FormatError(
            f"{words.shape[axis]} words of {num_bits}-bit codes hold {held} {what}, not the {size} that were stated"
        )


def pack_rows(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """(out, in) int8 codes -> (out, in * num_bits / 32) int32 words."""
    _whole_words("in_features", codes.shape[1], codes_per_word(num_bits))
    unsigned = to_unsigned(codes, num_bits)
    packed = _pair(unsigned) if num_bits == 4 else unsigned
    return packed.flatten().view(torch.int32).reshape(codes.shape[0], codes.shape[1] * num_bits // 32)


def unpack_rows(words: torch.Tensor, num_bits: int, in_features: int) -> torch.Tensor:
    """(out, in * num_bits / 32) int32 words -> (out, in) int8 codes."""
    _check_words(words, 1, num_bits, in_features, "columns")
    packed = words.flatten().view(torch.uint8).reshape(words.shape[0], words.shape[1] * 4)
    return to_signed(_unpair(packed) if num_bits == 4 else packed, num_bits)


def pack_columns(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """(out, in) int8 codes -> (in * num_bits / 32, out) int32 words."""
    return pack_rows(codes, num_bits).t().contiguous()


def unpack_columns(words: torch.Tensor, num_bits: int, in_features: int) -> torch.Tensor:
    """(in * num_bits / 32, out) int32 words -> (out, in) int8 codes."""
    _check_words(words, 0, num_bits, in_features, "inputs")
    return unpack_rows(words.t().contiguous(), num_bits, in_features)


def pack_interleaved(codes: torch.Tensor) -> torch.Tensor:
    """(out, in) int8 codes of 4 bits -> (in, out / 8) int32 words."""
    out_features, in_features = codes.shape
    _whole_words("out_features", out_features, 8)
    words = torch.empty(in_features, out_features // 8, dtype=torch.int32)
    order = torch.tensor(AWQ_ORDER)
    for start in range(0, out_features, _TILE_ROWS):
        unsigned = to_unsigned(codes[start : start + _TILE_ROWS], 4)
        nibbles = unsigned.reshape(-1, 8, in_features)[:, order]  # (out / 8, k, in)
        packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)  # (out / 8, byte of the word, in)
        tile = packed.permute(2, 0, 1).flatten().view(torch.int32).reshape(in_features, packed.shape[0])
        words[:, start // 8 : start // 8 + tile.shape[1]] = tile
    return words


def unpack_interleaved(words: torch.Tensor, out_features: int) -> torch.Tensor:
    """(in, out / 8) int32 words -> (out, in) int8 codes of 4 bits."""
    _check_words(words, 1, 4, out_features, "outputs")
    in_features = words.shape[0]
    codes = torch.empty(out_features, in_features, dtype=torch.int8)
    inverse = torch.tensor(AWQ_ORDER).argsort()
    for start in range(0, out_features, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, out_features)
        tile = words[:, start // 8 : stop // 8].flatten().view(torch.uint8).reshape(in_features, (stop - start) // 8, 4)
        packed = tile.permute(1, 2, 0).contiguous()  # (out / 8, byte of the word, in)
        nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1, 2)[:, inverse]
        codes[start:stop] = to_signed(nibbles.reshape(stop - start, in_features).contiguous(), 4)
    return codes
