"""Single rows of packed codes: torch's and Triton's (interpreted on a CPU) are those of the weight."""

from __future__ import annotations

import pytest
import torch
from low_bit_cases import weight

from grace_vlm.kernels.fragments import pack_linear
from grace_vlm.kernels.packed_rows import packed_rows, packed_rows_reference
from grace_vlm.kernels.packed_rows_triton import packed_rows as fused
from grace_vlm.quant.affine import dequantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(16, 32, 32), (48, 96, 32), (64, 352, 352), (32, 2176, 2176), (80, 192, 96)]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_every_row_is_that_of_the_weight(out: int, inputs: int, group: int, wide: bool) -> None:
    tensor = weight(8, out, inputs, group, wide=wide)
    packed = pack_linear(tensor, DEVICE)
    right = dequantize(tensor.codes, tensor.scale, torch.float32).to(DEVICE)
    ids = torch.cat([torch.randperm(out, generator=torch.Generator().manual_seed(0)), torch.tensor([out - 1, 0, 0])])
    ids = ids.to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed_rows_reference(packed, ids, dtype), right[ids].to(dtype))
        assert torch.equal(packed_rows(packed, ids, dtype), right[ids].to(dtype))
    assert torch.equal(fused(packed, ids, torch.float32), right[ids])
    # Triton's interpreter cuts where it should round to BF16.
    atol = 0.0 if DEVICE.type == "cuda" else float(right.abs().max()) * 2**-7
    torch.testing.assert_close(fused(packed, ids, torch.bfloat16), right[ids].bfloat16(), atol=atol, rtol=0)


def test_no_rows() -> None:
    packed, none = pack_linear(weight(8, 16, 64, 64), DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for call in (packed_rows, packed_rows_reference, fused):
        assert call(packed, none, torch.bfloat16).shape == (0, 64)


def test_rows_of_four_bits_are_refused() -> None:
    packed = pack_linear(weight(4, 16, 64, 64), DEVICE)
    with pytest.raises(AssertionError, match="rows of four bits"):
        packed_rows(packed, torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.float32)
