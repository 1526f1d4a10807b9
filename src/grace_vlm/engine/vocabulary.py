"""Both ends of a decoder: the rows that tokens become, and those that its states are compared with.

    embeddings(ids)   (n,) int64 -> (n, d)
    head(x)           (n, d)     -> (n, V)

Dense, they are the model's own weights, one tensor where it ties them. With ``int8`` the head's are 8-bit codes with a
BF16 scale a row, w = q s, rounded to nearest under min-max scales (``quant``). The search for scales of least squared
error would be twenty passes over the vocabulary and took a KL of 2.3e-5 to 1.8e-5 on the shipped student. Tied
embeddings are looked up in the head's codes: there is one copy either way.

A kernel takes rows in tiles of 16. A vocabulary of another size is filled up with rows of zeros, whose logits are cut
off: they are nobody's words, and a logit of 0 could win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from grace_vlm.engine.linear import Linear, Weight, detached
from grace_vlm.errors import ConfigError
from grace_vlm.kernels.cpu import missing
from grace_vlm.kernels.fragments import BLOCK, TILE
from grace_vlm.kernels.low_bit_cpu import PanelLinear, pack_panels, panel_rows
from grace_vlm.kernels.low_bit_linear import PackedLinear, pack_linear
from grace_vlm.kernels.packed_rows import packed_rows
from grace_vlm.quant.affine import quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Embeddings:
    """Of V words.

    Args:
        weight: (V, d), packed with V filled up, or in panels. dtype: of what comes out.
    """

    weight: Weight
    num_words: int
    dtype: torch.dtype

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, d) of (n,) int64."""
        if isinstance(self.weight, PackedLinear):
            return packed_rows(self.weight, ids, self.dtype)
        if isinstance(self.weight, PanelLinear):
            return panel_rows(self.weight, ids).to(self.dtype)
        assert isinstance(self.weight, torch.Tensor)
        return self.weight.index_select(0, ids)

    @property
    def device(self) -> torch.device:
        return self.weight.device


@dataclass(frozen=True)
class Head:
    """The product with all words; its outputs from ``num_words`` on are nobody's."""

    linear: Linear
    num_words: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(n, V) logits of (n, d) states after the last norm."""
        return self.linear(x)[:, : self.num_words]


def take_vocabulary(
    embed: Any, head: nn.Linear, rows: int | None, int8: bool, exact: bool = False
) -> tuple[Embeddings, Head]:
    """Embeddings and head of a model.

    Args:
        embed: its ``nn.Embedding``, (V, d). head: (V, d), the same tensor where they are tied.
        rows, exact: see ``Linear``. int8: the head in 8 bits, and with it tied embeddings. The model's own are let go.

    Raises:
        ConfigError: a width that no kernel takes.
    """
    weight, num_words = embed.weight.detach(), len(head.weight)
    bias = detached(head.bias)
    if not int8:
        plain = Linear(head.weight.detach(), bias, rows=rows)
        return Embeddings(weight, len(weight), weight.dtype), Head(plain, num_words)
    if head.in_features % BLOCK:
        raise ConfigError(
            f"int8_head was asked for and the model is {head.in_features} wide; expected a multiple of {BLOCK}: leave "
            "it out"
        )
    is_tied = head.weight.data_ptr() == embed.weight.data_ptr()
    codes = quantized_rows(head.weight.detach())
    packed: PackedLinear | PanelLinear
    if weight.device.type == "cpu" and missing() is None:
        packed, filled = pack_panels(_in_groups(codes)), bias
    else:
        packed = pack_linear(_filled_up(codes), weight.device)
        filled = None if bias is None else F.pad(bias, (0, -num_words % TILE))
    head.weight = None  # type: ignore[assignment]
    if is_tied:
        embed.weight = None
    embeddings = Embeddings(packed if is_tied else weight, len(weight), weight.dtype)
    return embeddings, Head(Linear(packed, filled, rows=rows, exact=exact), num_words)


def quantized_rows(weight: torch.Tensor) -> QuantizedTensor:
    """(V, d) in 8 bits, a scale a row; in parts, whose FP32 copies are what memory must hold beside."""
    scheme = QuantScheme(8, weight.shape[1])
    parts = []
    for part in weight.split(max(1, _ELEMENTS // weight.shape[1])):
        wide = part.float()
        parts.append(quantize_tensor(wide, minmax_scale(wide, scheme), scheme))
    return QuantizedTensor(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]), scheme)


def _in_groups(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same numbers, a row's scale repeated: the CPU's kernel rounds activations group by group, and one step for a
    whole row of them would be as coarse as its largest number is large."""
    group = next(size for size in (128, 64, 32) if tensor.shape[1] % size == 0)
    scale = tensor.scale.expand(-1, tensor.shape[1] // group).contiguous()
    return QuantizedTensor(tensor.codes, scale, QuantScheme(8, group))


def _filled_up(tensor: QuantizedTensor) -> QuantizedTensor:
    """With rows of zeros to a multiple of ``TILE``."""
    missing = (0, 0, 0, -tensor.shape[0] % TILE)
    return QuantizedTensor(F.pad(tensor.codes, missing), F.pad(tensor.scale, missing, value=1.0), tensor.scheme)
