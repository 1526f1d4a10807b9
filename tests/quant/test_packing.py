"""The rows layout: a golden word, a drawing, the identity, refusals."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_vlm.errors import FormatError
from grace_vlm.quant.packing import (
    AWQ_ORDER,
    pack_columns,
    pack_interleaved,
    pack_rows,
    unpack_columns,
    unpack_interleaved,
    unpack_rows,
)


def test_golden_word_of_four_bits() -> None:
    words = pack_rows(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8), 4)
    assert words.dtype == torch.int32
    assert words.tolist() == [[0x76543210]]


def test_golden_words_of_eight_bits_and_of_the_sign_bit() -> None:
    # Offset binary: -128 is 0x00, 0 is 0x80, 127 is 0xff.
    assert pack_rows(torch.tensor([[-128, -127, 0, -1]], dtype=torch.int8), 8).tolist() == [[0x7F800100]]
    assert pack_rows(torch.tensor([[0, 0, 0, 127]], dtype=torch.int8), 8).tolist() == [[-(2**32) + 0xFF808080]]
    assert pack_rows(torch.tensor([[-8] * 7 + [0]], dtype=torch.int8), 4).tolist() == [[-(2**31)]]
    assert pack_rows(torch.full((1, 8), 7, dtype=torch.int8), 4).tolist() == [[-1]]
    assert pack_rows(torch.zeros((1, 8), dtype=torch.int8), 4).tolist() == [[-(2**32) + 0x88888888]]


@pytest.mark.parametrize("num_bits", [4, 8])
def test_bytes_are_those_of_the_drawing(num_bits: int) -> None:
    """Column by column from the least significant bit, written with struct and not with torch."""
    generator = torch.Generator().manual_seed(num_bits)
    half = 2 ** (num_bits - 1)
    codes = torch.randint(-half, half, (3, 64), generator=generator, dtype=torch.int8)
    per_word = 32 // num_bits
    for row, words in zip(codes.tolist(), pack_rows(codes, num_bits).tolist(), strict=True):
        for j, word in enumerate(words):
            value = sum((row[per_word * j + k] + half) << (num_bits * k) for k in range(per_word))
            assert struct.pack("<i", word) == struct.pack("<I", value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    num_bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 5),
    words=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(num_bits: int, rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half, columns = 2 ** (num_bits - 1), words * 32 // num_bits
    codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack_rows(codes, num_bits)
    assert packed.shape == (rows, words)
    back = unpack_rows(packed, num_bits, columns)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(num_bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**31))
def test_pack_undoes_unpack(num_bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (4, 6), generator=generator).to(torch.int32)
    assert torch.equal(pack_rows(unpack_rows(words, num_bits, 6 * 32 // num_bits), num_bits), words)


@pytest.mark.parametrize("num_bits", [2, 3, 5, 16])
def test_bits_without_a_layout_are_refused(num_bits: int) -> None:
    expected = f"no packed layout holds {num_bits}-bit codes; expected 4 or 8 bits"
    for call in (
        lambda: pack_rows(torch.zeros(1, 32, dtype=torch.int8), num_bits),
        lambda: unpack_rows(torch.zeros(1, 1, dtype=torch.int32), num_bits, 8),
    ):
        with pytest.raises(FormatError) as caught:
            call()
        assert str(caught.value) == expected


def test_columns_that_fill_no_word_are_refused() -> None:
    with pytest.raises(FormatError) as caught:
        pack_rows(torch.zeros(2, 12, dtype=torch.int8), 4)
    assert str(caught.value) == "in_features 12 is not a multiple of 8, the codes of a word"


def test_a_shape_that_lies_is_refused() -> None:
    with pytest.raises(FormatError) as caught:
        unpack_rows(torch.zeros(2, 3, dtype=torch.int32), 4, 32)
    assert str(caught.value) == "3 words of 4-bit codes hold 24 columns, not the 32 that were stated"


@pytest.mark.parametrize("code", [-9, 8, 127])
def test_codes_outside_the_range_are_refused(code: int) -> None:
    codes = torch.zeros(1, 8, dtype=torch.int8)
    codes[0, 3] = code
    with pytest.raises(FormatError, match="codes outside the 4-bit range"):
        pack_rows(codes, 4)


def test_golden_word_of_awq() -> None:
    """Outputs 0..7 hold the values 0..7 (as u): the word says its own order."""
    codes = torch.arange(-8, 0, dtype=torch.int8).reshape(8, 1)
    assert pack_interleaved(codes).tolist() == [[0x75316420]]


def test_interleaved_and_columns_are_their_drawings() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (24, 16), generator=generator, dtype=torch.int8)
    words = pack_interleaved(codes).tolist()
    for column in range(16):
        for c in range(3):
            value = sum((int(codes[8 * c + o, column]) + 8) << (4 * k) for k, o in enumerate(AWQ_ORDER))
            assert words[column][c] & 0xFFFFFFFF == value
    words = pack_columns(codes, 4).tolist()
    for r in range(2):
        for out in range(24):
            value = sum((int(codes[out, 8 * r + k]) + 8) << (4 * k) for k in range(8))
            assert words[r][out] & 0xFFFFFFFF == value


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    num_bits=st.sampled_from([4, 8]), out_words=st.integers(1, 300), words=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_transposed_layouts_are_undone(num_bits: int, out_words: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (num_bits - 1)
    codes = torch.randint(-half, half, (8 * out_words, words * 8), generator=generator, dtype=torch.int8)
    packed = pack_columns(codes, num_bits)
    assert packed.shape == (words * 8 * num_bits // 32, 8 * out_words)
    assert torch.equal(unpack_columns(packed, num_bits, words * 8), codes)
    if num_bits == 4:
        assert torch.equal(unpack_interleaved(pack_interleaved(codes), 8 * out_words), codes)


def test_transposed_layouts_refuse_what_has_no_whole_words() -> None:
    with pytest.raises(FormatError, match="out_features 12 is not a multiple of 8"):
        pack_interleaved(torch.zeros(12, 8, dtype=torch.int8))
    with pytest.raises(FormatError, match="hold 8 outputs, not the 16"):
        unpack_interleaved(torch.zeros(4, 1, dtype=torch.int32), 16)
    with pytest.raises(FormatError, match="hold 8 inputs, not the 16"):
        unpack_columns(torch.zeros(1, 4, dtype=torch.int32), 4, 16)
