"""Integer layouts of codes, named and drawn. Each pair is an exact inverse.

``rows`` (compressed-tensors ``pack-quantized``; also the word layout of MLX). Offset binary u = q + 2^(b-1), packed
along in_features into int32, least significant first:

    word j of a row, 4 bits:   bits 31..28  27..24  ...   7..4    3..0
                               column 8j+7    8j+6  ...   8j+1      8j
    codes -8 -7 -6 -5 -4 -3 -2 -1 in columns 8j..8j+7 give the word 0x76543210.
    8 bits: byte k of word j is column 4j+k.

Only 4 and 8 bits have a layout that runtimes read; 3 and 2 bits are studied as int8 codes.
"""

from __future__ import annotations

import torch

from grace_vlm.errors import FormatError


def _codes_per_word(num_bits: int) -> int:
    if num_bits not in (4, 8):
        raise FormatError(f"no packed layout holds {num_bits}-bit codes; expected 4 or 8 bits")
    return 32 // num_bits


def pack_rows(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """(out, in) int8 codes -> (out, in * num_bits / 32) int32 words."""
    per_word = _codes_per_word(num_bits)
    out_features, in_features = codes.shape
    if in_features % per_word:
        raise FormatError(f"in_features {in_features} is not a multiple of {per_word} ({num_bits}-bit words)")
    unsigned = (codes.to(torch.int64) + (1 << (num_bits - 1))).reshape(out_features, in_features // per_word, per_word)
    if unsigned.numel() and not 0 <= int(unsigned.min()) <= int(unsigned.max()) < (1 << num_bits):
        raise FormatError(f"codes outside the {num_bits}-bit range; expected [-{1 << num_bits - 1}, ...]")
    shifts = torch.arange(per_word, device=codes.device) * num_bits
    words = (unsigned << shifts).sum(dim=-1)
    # Two's complement: words above 2^31 - 1 become negative int32.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_rows(words: torch.Tensor, num_bits: int, in_features: int) -> torch.Tensor:
    """(out, in * num_bits / 32) int32 words -> (out, in) int8 codes."""
    per_word = _codes_per_word(num_bits)
    if words.shape[1] * per_word != in_features:
        raise FormatError(
            f"{words.shape[1]} words of {num_bits}-bit codes hold {words.shape[1] * per_word} columns, "
            f"not the {in_features} that were stated"
        )
    shifts = torch.arange(per_word, device=words.device) * num_bits
    unsigned = (words.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << num_bits) - 1)
    return (unsigned - (1 << (num_bits - 1))).to(torch.int8).reshape(words.shape[0], in_features)
