"""Torch's own layer of 4 bits on a CPU: where there is no compiler for ours. BF16 activations, four to six times the
time of ``low_bit_cpu.py`` (docs/kernels.md), an eighth of FP32's memory.

With FP32 activations the operator runs scalar code, a hundred times slower than with BF16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from grace_vlm.quant.scheme import QuantizedTensor

TILE = 16
INNER_TILES = 2
"""An argument that the operator checks and a CPU does not use."""


@dataclass(frozen=True)
class Int4PackLinear:
    """A weight for ``int4pack_linear``.

    Args:
        codes: uint8, in torch's order.
        scales: BF16 (groups, out, 2), scale and zero: the weight is (u - 8) scale + zero.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int

    device: ClassVar = torch.device("cpu")

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def takes_int4pack(tensor: QuantizedTensor) -> bool:
    """4 bits, BF16 scales, groups that the operator knows, whole tiles, and AVX2: without it the operator is scalar."""
    group = tensor.shape[1] // tensor.scale.shape[1]
    is_known = tensor.scheme.num_bits == 4 and tensor.scale.dtype == torch.bfloat16 and group in (32, 64, 128, 256)
    return is_known and tensor.shape[0] % TILE == 0 and bool(torch.cpu._is_avx2_supported())


def pack_int4(tensor: QuantizedTensor) -> Int4PackLinear:
    """Codes and scales as the operator wants them, for what ``takes_int4pack``."""
    codes = torch._convert_weight_to_int4pack_for_cpu(tensor.codes.int() + 8, INNER_TILES)
    scales = torch.stack([tensor.scale, torch.zeros_like(tensor.scale)], dim=-1).transpose(0, 1).contiguous()
    return Int4PackLinear(codes, scales, tensor.shape[1] // tensor.scale.shape[1])


def int4pack_linear(x: torch.Tensor, packed: Int4PackLinear) -> torch.Tensor:
    """x W^T: (n, in) -> (n, out) BF16; x is rounded to BF16."""
    return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed.codes, packed.group_size, packed.scales)
