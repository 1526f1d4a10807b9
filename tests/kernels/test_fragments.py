"""The kernels' layout: every code at the bits that a tensor core's lane takes it from, and back again."""

from __future__ import annotations

import pytest
import torch
from low_bit_cases import weight

from grace_vlm.errors import ConfigError
from grace_vlm.kernels.fragments import pack_linear, row_scales, unpack_codes
from grace_vlm.quant.affine import dequantize

SHAPES = [(16, 32, 32), (16, 64, 64), (48, 96, 32), (48, 192, 96), (32, 256, 128), (64, 576, 64), (16, 352, 352)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group"), SHAPES)
def test_there_and_back(bits: int, out: int, inputs: int, group: int) -> None:
    tensor = weight(bits, out, inputs, group)
    packed = pack_linear(tensor)
    assert torch.equal(unpack_codes(packed), tensor.codes)
    assert torch.equal(row_scales(packed), tensor.scale)
    whole = -(-inputs // 64) * 64 if bits == 4 else inputs
    assert packed.words.nbytes == out * whole * bits // 8
    assert packed.num_bytes == packed.words.nbytes + 2 * tensor.scale.numel()


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_where_the_tensor_core_takes_it_from(bits: int) -> None:
    """By the PTX ISA's fragments of mma.m16n8k16, product after product; element by element."""
    tensor = weight(bits, 32, 128, 32)
    words = pack_linear(tensor).words
    for product in range(128 // 16):
        block, s = divmod(product, 2)
        for lane in range(32):
            g, t = divmod(lane, 4)
            for register in range(4):
                row = g + 8 * (register % 2)
                for e in range(2):
                    position = 2 * t + e + 8 * (register // 2)  # of the sixteen that the product sums over
                    # B has a token's inputs in the same order: lane t brings four, x[32 b + 8 t + 4 s ...].
                    k = 32 * block + 8 * ((position % 8) // 2) + 4 * s + 2 * (position // 8) + position % 2
                    for tile in range(2):
                        if bits == 4:
                            word = int(words[tile, block // 2, lane, 2 * (block % 2) + s])
                            found = (word >> (4 * register + 16 * e) & 15) - 8
                        else:
                            word = int(words[tile, block, lane, 2 * s + register // 2])
                            found = (word >> (8 * (2 * (register % 2) + e)) & 255) - 128
                        assert found == int(tensor.codes[16 * tile + row, k])


def test_a_kept_copy_and_scales_that_bf16_cannot_hold() -> None:
    tensor = weight(4, 32, 128, 32, wide=True)
    packed = pack_linear(tensor, keep_bf16=True)
    assert packed.scale.dtype == torch.float32
    assert torch.equal(row_scales(packed), tensor.scale)
    assert packed.dense is not None
    assert torch.equal(packed.dense, dequantize(tensor.codes, tensor.scale))
    assert packed.num_bytes == packed.words.nbytes + packed.scale.nbytes + packed.dense.nbytes


@pytest.mark.parametrize(("bits", "out", "inputs", "group"), [(3, 16, 32, 32), (4, 24, 64, 32), (8, 16, 48, 16)])
def test_what_has_no_kernel_is_refused(bits: int, out: int, inputs: int, group: int) -> None:
    with pytest.raises(ConfigError) as caught:
        pack_linear(weight(bits, out, inputs, group))
    assert str(caught.value) == (
        f"a {out} x {inputs} weight of {bits} bits in groups of {group} has no fast kernel; "
        "expected 4 or 8 bits, out_features a multiple of 16 and groups of a multiple of 32"
    )
