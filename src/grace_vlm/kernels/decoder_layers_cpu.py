"""All layers of a decoder for one token each of some requests, in one call on a CPU (decoder_cpu.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from grace_vlm.kernels.cpu import address, library, num_threads, wide
from grace_vlm.kernels.decoder_rows import Norm
from grace_vlm.kernels.decoder_rows_cpu import WIDTH, new_slots, takes_heads
from grace_vlm.kernels.heads import Heads
from grace_vlm.kernels.low_bit_cpu import PanelLinear


@dataclass(frozen=True)
class PanelLayer:
    """One layer.

    Args:
        products: of q, k and v, after attention, of gates and values, and down; each with its bias (out,) or None.
        keys, values: (slots, KV, D).
    """

    attention_norm: Norm
    mlp_norm: Norm
    heads: Heads
    products: Sequence[tuple[PanelLinear, torch.Tensor | None]]
    keys: torch.Tensor
    values: torch.Tensor


class _Product(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "bias")),
        *((name, ctypes.c_long) for name in ("rows", "inputs", "group", "bits")),
    ]


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
        *((f"{name}_norm", ctypes.c_void_p) for name in ("attention", "mlp", "query", "key")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((f"{name}_epsilon", ctypes.c_float) for name in ("attention", "mlp", "head")),
    ]


class DecoderLayers:
    """The layers as C reads them: laid out once, called for every token.

    Args:
        exact: FP32 activations, not bytes. page_tokens: of a page of keys and values.
    """

    def __init__(self, layers: Sequence[PanelLayer], exact: bool, page_tokens: int) -> None:
        self._kept: list[object] = list(layers)  # tensors whose addresses are in the structures
        self._exact, self._page_tokens, self._heads = exact, page_tokens, layers[0].heads
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))

    @staticmethod
    def takes(layer: PanelLayer) -> bool:
        """Whether C can: heads, gates and a cache as the functions of ``decoder_rows_cpu`` want them."""
        (qkv, _), _, (gate_up, _), _ = layer.products
        x = torch.empty(1, qkv.in_features)
        gates = gate_up.out_features
        return gates % (2 * WIDTH) == 0 and takes_heads(x, layer.keys, layer.values, layer.heads)

    def _layer(self, layer: PanelLayer) -> _Layer:
        made = _Layer()
        for name, (packed, bias) in zip(("qkv", "out", "gate_up", "down"), layer.products, strict=True):
            sizes = (packed.out_features, packed.in_features, packed.group_size, packed.num_bits)
            product = _Product(address(packed.codes), address(packed.scale), self._at(bias), *sizes)
            setattr(made, name, product)
        heads = layer.heads
        made.attention_norm, made.mlp_norm = self._at(layer.attention_norm.weight), self._at(layer.mlp_norm.weight)
        made.query_norm, made.key_norm = self._at(heads.query_norm), self._at(heads.key_norm)
        made.keys, made.values = address(layer.keys), address(layer.values)
        made.attention_epsilon, made.mlp_epsilon = layer.attention_norm.epsilon, layer.mlp_norm.epsilon
        made.head_epsilon = heads.epsilon
        return made

    def _at(self, tensor: torch.Tensor | None) -> int | None:
        """The address of FP32 numbers, which live as long as this does."""
        kept = wide(tensor)
        self._kept.append(kept)
        return address(kept)

    def __call__(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """(B, d) states after all layers of x (B, d) FP32, which they take the place of.

        Args:
            rotation: cos and sin, (B, D) each. table, lengths: as ``paged_attention`` has them.
        """
        slots = new_slots(table, lengths, self._page_tokens)
        kept = [part.contiguous() for part in (x, *rotation, slots, table, lengths)]
        heads = self._heads
        sizes = (len(x), table.shape[1], self._page_tokens, heads.num_heads, heads.num_kv_heads, heads.head_dim)
        failed = library().decode_layers(
            self._layers, len(self._layers), *map(address, kept), *sizes, self._exact, num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the states of a step")
        return kept[0]
