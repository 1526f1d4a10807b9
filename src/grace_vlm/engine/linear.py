"""A product of the decoder, dense or packed, with the norm before it and what is added after.

Tensors of the model's dtype; a packed weight runs by ``kernels/low_bit_linear.py``, a plain one of few tokens on a GPU
by ``kernels/plain_linear.py``; on a CPU packed ones run in panels by ``kernels/low_bit_cpu.py``, or without a compiler
by torch's own operator (``kernels/int4pack.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from grace_vlm.kernels.decoder_rows import Norm, gated, rms_norm
from grace_vlm.kernels.int4pack import Int4PackLinear, int4pack_linear
from grace_vlm.kernels.low_bit_cpu import PanelLinear, panel_linear
from grace_vlm.kernels.low_bit_linear import PackedLinear, low_bit_linear
from grace_vlm.kernels.plain_linear import plain_linear, takes_plain

Weight = torch.Tensor | PackedLinear | PanelLinear | Int4PackLinear
"""(out, in), in the forms that something multiplies."""


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b.

    Args:
        weight: (out, in), packed, or in panels. bias: (out,) or None. silu: the outputs are gates and values;
            silu(gate) * value comes out. A packed weight then is ``interleaved``, the others have all gates first.
        rows: so many rows are one product, whatever is asked, so that a row's numbers do not depend on how many there
            are; None: all at once, by whatever is fastest for so many.
        exact: of panels: FP32 activations, not bytes.
    """

    weight: Weight
    bias: torch.Tensor | None = None
    silu: bool = False
    rows: int | None = None
    exact: bool = False

    def __call__(self, x: torch.Tensor, norm: Norm | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(n, out') of (n, in), normalised before where a norm is given, with ``residual`` (n, out') added after."""
        if self.rows is None:
            return self._product(x, norm, residual)
        padding = (0, 0, 0, -len(x) % self.rows)
        pieces = F.pad(x, padding).split(self.rows)
        rest = [None] * len(pieces) if residual is None else F.pad(residual, padding).split(self.rows)
        parts = [self._product(piece, norm, own) for piece, own in zip(pieces, rest, strict=True)]
        return torch.cat(parts)[: len(x)]

    def _product(self, x: torch.Tensor, norm: Norm | None, residual: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.weight, PackedLinear):
            return low_bit_linear(x, self.weight, bias=self.bias, residual=residual, norm=norm, silu=self.silu)
        if isinstance(self.weight, PanelLinear):
            added = None if residual is None or self.silu else residual.float()
            y = panel_linear(x.float(), self.weight, norm=norm, bias=self.bias, residual=added, exact=self.exact)
            if not self.silu:
                return y.to(x.dtype)
            y = gated(y).to(x.dtype)
            return y if residual is None else residual + y
        given = x if norm is None else rms_norm(x, norm)
        if isinstance(self.weight, torch.Tensor) and takes_plain(given, self.weight):
            return plain_linear(given, self.weight, bias=self.bias, residual=residual, silu=self.silu)
        if isinstance(self.weight, Int4PackLinear):
            y = int4pack_linear(given, self.weight).to(x.dtype)
            y = y if self.bias is None else y + self.bias
        elif residual is not None and self.bias is None and x.is_cuda and not self.silu:
            return torch.addmm(residual, given, self.weight.t())  # one launch
        else:
            y = F.linear(given, self.weight, self.bias)
        if self.silu:
            y = gated(y)
        return y if residual is None else residual + y


def address(weight: Weight) -> int:
    """Of its memory: one number for tied weights."""
    if isinstance(weight, PackedLinear):
        return weight.words.data_ptr()
    return weight.data_ptr() if isinstance(weight, torch.Tensor) else weight.codes.data_ptr()


def num_bytes(weight: Weight) -> int:
    return weight.nbytes if isinstance(weight, torch.Tensor) else weight.num_bytes


def detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()
