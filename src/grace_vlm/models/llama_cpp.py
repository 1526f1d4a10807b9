"""llama.cpp's names of a decoder's tensors, and the order of rows that its architecture ``llama`` has.

Below ``formats``, which writes and reads such files, for SmolLM2 comes as one (``smollm2_file.py``).
"""

from __future__ import annotations

import re

import torch

from grace_vlm.errors import FormatError

DECODER = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "layers.N.input_layernorm": "blk.N.attn_norm",
    "layers.N.self_attn.q_proj": "blk.N.attn_q",
    "layers.N.self_attn.k_proj": "blk.N.attn_k",
    "layers.N.self_attn.v_proj": "blk.N.attn_v",
    "layers.N.self_attn.o_proj": "blk.N.attn_output",
    "layers.N.self_attn.q_norm": "blk.N.attn_q_norm",
    "layers.N.self_attn.k_norm": "blk.N.attn_k_norm",
    "layers.N.post_attention_layernorm": "blk.N.ffn_norm",
    "layers.N.mlp.gate_proj": "blk.N.ffn_gate",
    "layers.N.mlp.up_proj": "blk.N.ffn_up",
    "layers.N.mlp.down_proj": "blk.N.ffn_down",
}
"""Modules of Transformers' decoders -> of the file; N is a layer's number."""
NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
"""Such a number in a name of either."""


def _require_halves(rows: torch.Tensor, num_heads: int) -> None:
    if rows.shape[0] % (2 * num_heads):
        raise FormatError(
            f"a matrix of q or k has {rows.shape[0]} rows; {num_heads} heads need a multiple of twice that"
        )


def interleaved(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows (heads * d, ...) as architecture ``llama`` has those of q and k: 0, d/2, 1, d/2 + 1, ... of each head."""
    _require_halves(rows, num_heads)
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def apart(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The inverse of ``interleaved``."""
    _require_halves(rows, num_heads)
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
