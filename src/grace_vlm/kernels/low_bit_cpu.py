"""The linear layer of 4 or 8 bits on a CPU (low_bit_cpu.c).

pack_panels(QuantizedTensor)            once: panels of sixteen rows (low_bit_cpu.c draws them)
panel_linear(x, packed)                 FP32 in and out; activations become bytes, a scale a token and group
panel_linear(x, packed, exact=True)     FP32 arithmetic on q s
panel_rows(packed, ids)                 single rows, where a head is an embedding too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.kernels.cpu import address, library, num_threads, wide
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.packing import to_unsigned
from grace_vlm.quant.scheme import QuantizedTensor

if TYPE_CHECKING:
    from grace_vlm.kernels.decoder_rows import Norm

ROWS, SLAB = 16, 32
"""Rows of a panel, and inputs that lie together in it."""


@dataclass(frozen=True)
class PanelLinear:
    """A weight for ``panel_linear``.

    Args:
        codes: uint8 (panels, slabs, chunks, 16, 4), a chunk for every bit; rows that fill up a panel mean 0.
        group_size: inputs of a scale. scale: FP32 (panels, groups, 16).
        out_features, in_features: of the layer, nothing filled up.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    num_bits: int
    group_size: int
    out_features: int
    in_features: int

    device: ClassVar = torch.device("cpu")

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def addresses(self) -> tuple[int, int]:
        """Of codes and scales."""
        return self.codes.data_ptr(), self.scale.data_ptr()


def takes(tensor: QuantizedTensor) -> bool:
    """Whether ``pack_panels`` does."""
    return tensor.scheme.num_bits in (4, 8) and tensor.shape[1] // tensor.scale.shape[1] % 32 == 0


def pack_panels(tensor: QuantizedTensor) -> PanelLinear:
    """Codes and scales of a weight in panels.

    Raises:
        ConfigError: not 4 or 8 bits, or groups of no multiple of 32.
    """
    out_features, in_features = tensor.shape
    bits, group = tensor.scheme.num_bits, in_features // tensor.scale.shape[1]
    if not takes(tensor):
        raise ConfigError(
            f"a weight of {bits} bits in groups of {group} has no fast kernel on a CPU; expected 4 or 8 bits and "
            "groups of a multiple of 32"
        )
    rows = -(-out_features // ROWS) * ROWS
    codes = torch.zeros(rows, in_features, dtype=torch.int8)
    codes[:out_features] = tensor.codes
    fours = codes.view(rows // ROWS, ROWS, in_features // SLAB, SLAB // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        unsigned = to_unsigned(fours, 4)
        packed = unsigned[:, :, :4] | unsigned[:, :, 4:] << 4
    else:
        packed = fours.contiguous().view(torch.uint8)
    scale = torch.zeros(rows, tensor.scale.shape[1], dtype=torch.float32)
    scale[:out_features] = tensor.scale.float()
    panels = scale.view(rows // ROWS, ROWS, -1).transpose(1, 2).contiguous()
    return PanelLinear(packed.contiguous(), panels, bits, group, out_features, in_features)


def panel_linear(
    x: torch.Tensor,
    packed: PanelLinear,
    *,
    norm: Norm | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    exact: bool = False,
    threads: int | None = None,
) -> torch.Tensor:
    """rms_norm(x) W^T + bias + residual.

    Args:
        x: (..., in) FP32. norm: weight (in,). bias: (out,). residual: (..., out). All FP32.
        exact: FP32 arithmetic on q s; else activations are rounded to 127 steps of the largest of their group.
        threads: see ``cpu.num_threads``.

    Returns:
        (..., out) FP32.

    Raises:
        ConfigError: another dtype or width; no kernel here (``cpu.why_not``).
    """
    if x.dtype != torch.float32 or x.shape[-1] != packed.in_features:
        raise ConfigError(
            f"panel_linear was given {tuple(x.shape)} in {x.dtype} for a layer of {packed.in_features} inputs; "
            f"expected (..., {packed.in_features}) in torch.float32"
        )
    flat = x if x.ndim == 2 and x.is_contiguous() else x.reshape(-1, packed.in_features).contiguous()
    out = torch.empty(len(flat), packed.out_features, dtype=torch.float32)
    # Named, so that copies live while their addresses are used.
    weight, bias, residual = wide(None if norm is None else norm.weight), wide(bias), wide(residual)
    status = library().low_bit_linear(
        *packed.addresses, flat.data_ptr(), address(weight), address(bias), address(residual), out.data_ptr(),
        len(flat), packed.out_features, packed.in_features, packed.group_size,
        norm.epsilon if norm else 0.0, packed.num_bits, exact, threads or num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError("no memory for the bytes of a layer's inputs")
    return out if x.ndim == 2 else out.view(*x.shape[:-1], packed.out_features)


def panel_rows(packed: PanelLinear, ids: torch.Tensor) -> torch.Tensor:
    """(n, in) q s of rows ``ids`` (n,) int64, in FP32."""
    assert packed.num_bits == 8, "rows of four bits are nobody's embedding"
    panel, row = ids // ROWS, ids % ROWS
    codes = packed.codes[panel, :, :, row].view(torch.int8).flatten(1)
    return dequantize(codes, packed.scale[panel, :, row], torch.float32)
