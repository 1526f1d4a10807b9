"""The names of llama.cpp's tensors, and the order of rows that its architecture ``llama`` has."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.errors import FormatError
from grace_vlm.models.llama_cpp import DECODER, NUMBER, apart, interleaved


def test_a_head_s_halves_one_by_one() -> None:
    rows = torch.arange(12.0).reshape(12, 1)
    assert interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(apart(interleaved(rows, 2), 2), rows)


def test_rows_that_are_no_whole_heads() -> None:
    for function in (interleaved, apart):
        with pytest.raises(FormatError, match="has 6 rows; 2 heads need a multiple of twice that"):
            function(torch.zeros(6, 2), 2)


def test_names_are_one_to_one() -> None:
    assert len(set(DECODER.values())) == len(DECODER)
    assert NUMBER.sub("N", "blk.12.attn_q") == "blk.N.attn_q"
    assert NUMBER.search("output_norm.weight") is None
