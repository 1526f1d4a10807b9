"""Which tensor of a GGUF file is which of a Transformers model, in both directions.

A stock name is a prefix, which depends on who saved the model, and a rest, which does not. The prefixes are read off
four tensors when a model is written, and recorded in the file (``grace.prefixes``), so that reading gives back the very
names; a file of llama.cpp's has none and gets those that Transformers writes.

One stock tensor is one of the file, but for two: Qwen2-VL's attention has q, k and v apart (cut along the rows), and a
convolution over two frames is two over one (cut along the frames).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from grace_vlm.errors import FormatError
from grace_vlm.models.llama_cpp import DECODER, NUMBER


def _both(rules: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Rules of modules as rules of their weights and biases."""
    return {f"{stock}.{leaf}": (f"{gguf}.{leaf}",) for stock, gguf in rules.items() for leaf in ("weight", "bias")}


TEXT = _both(DECODER)
HEAD = _both({"lm_head": "output"})
_FRAMES = {"patch_embed.proj.weight": ("v.patch_embd.weight", "v.patch_embd.weight.1")}
_QWEN3_VISION = _both(
    {
        "patch_embed.proj": "v.patch_embd",
        "pos_embed": "v.position_embd",
        "blocks.N.norm1": "v.blk.N.ln1",
        "blocks.N.norm2": "v.blk.N.ln2",
        "blocks.N.attn.qkv": "v.blk.N.attn_qkv",
        "blocks.N.attn.proj": "v.blk.N.attn_out",
        "blocks.N.mlp.linear_fc1": "v.blk.N.ffn_up",
        "blocks.N.mlp.linear_fc2": "v.blk.N.ffn_down",
        "merger.norm": "v.post_ln",
        "merger.linear_fc1": "mm.0",
        "merger.linear_fc2": "mm.2",
        "deepstack_merger_list.N.norm": "v.deepstack.N.norm",
        "deepstack_merger_list.N.linear_fc1": "v.deepstack.N.fc1",
        "deepstack_merger_list.N.linear_fc2": "v.deepstack.N.fc2",
    }
)
_QWEN2_VISION = _both(
    {
        "patch_embed.proj": "v.patch_embd",
        "blocks.N.norm1": "v.blk.N.ln1",
        "blocks.N.norm2": "v.blk.N.ln2",
        "blocks.N.attn.proj": "v.blk.N.attn_out",
        "blocks.N.mlp.fc1": "v.blk.N.ffn_up",
        "blocks.N.mlp.fc2": "v.blk.N.ffn_down",
        "merger.ln_q": "v.post_ln",
        "merger.mlp.0": "mm.0",
        "merger.mlp.2": "mm.2",
    }
)
_QWEN25_VISION = _both(
    {
        "blocks.N.mlp.gate_proj": "v.blk.N.ffn_gate",
        "blocks.N.mlp.up_proj": "v.blk.N.ffn_up",
        "blocks.N.mlp.down_proj": "v.blk.N.ffn_down",
    }
)
_QKV = {
    f"blocks.N.attn.qkv.{leaf}": tuple(f"v.blk.N.attn_{part}.{leaf}" for part in "qkv") for leaf in ("weight", "bias")
}
_CLIP = {
    "embeddings.class_embedding": ("v.class_embd",),
    **_both(
        {
            "embeddings.patch_embedding": "v.patch_embd",
            "embeddings.position_embedding": "v.position_embd",
            "pre_layrnorm": "v.pre_ln",
            "encoder.layers.N.layer_norm1": "v.blk.N.ln1",
            "encoder.layers.N.layer_norm2": "v.blk.N.ln2",
            "encoder.layers.N.self_attn.q_proj": "v.blk.N.attn_q",
            "encoder.layers.N.self_attn.k_proj": "v.blk.N.attn_k",
            "encoder.layers.N.self_attn.v_proj": "v.blk.N.attn_v",
            "encoder.layers.N.self_attn.out_proj": "v.blk.N.attn_out",
            "encoder.layers.N.mlp.fc1": "v.blk.N.ffn_up",
            "encoder.layers.N.mlp.fc2": "v.blk.N.ffn_down",
            # LLaVA does not use it, and llama.cpp would if it had its own name.
            "post_layernorm": "grace.post_layernorm",
        }
    ),
}


class Architecture(NamedTuple):
    """llama.cpp's name of a family, its rules by projector type, stock prefixes of text, head, vision, projector."""

    name: str
    projectors: Mapping[str, Mapping[str, tuple[str, ...]]]
    prefixes: tuple[str, str, str, str]
    vision_anchor: str


QWEN3 = Architecture(
    "qwen3vl",
    {"qwen3vl_merger": {**_QWEN3_VISION, **_FRAMES}},
    ("model.language_model.", "", "model.visual.", ""),
    "patch_embed.proj.weight",
)
QWEN2 = Architecture(
    "qwen2vl",
    {
        "qwen2vl_merger": {**_QWEN2_VISION, **_QKV, **_FRAMES},
        "qwen2.5vl_merger": {**_QWEN2_VISION, **_QWEN25_VISION, **_QKV, **_FRAMES},
    },
    ("model.", "", "visual.", ""),
    "patch_embed.proj.weight",
)
LLAVA = Architecture(
    "llama",
    {"mlp": _CLIP},
    ("language_model.model.", "language_model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "embeddings.class_embedding",
)
ARCHITECTURES = {one.name: one for one in (QWEN3, QWEN2, LLAVA)}
BY_MODEL_TYPE = {
    "qwen3_vl": (QWEN3, "qwen3vl_merger"),
    "qwen2_vl": (QWEN2, "qwen2vl_merger"),
    "qwen2_5_vl": (QWEN2, "qwen2.5vl_merger"),
    "llava": (LLAVA, "mlp"),
}
"""Transformers' model_type -> architecture and projector type."""
_PROJECTOR = _both({"linear_1": "mm.0", "linear_2": "mm.2"})


@dataclass(frozen=True)
class Names:
    """The two names of every tensor of one model.

    Args:
        projector: projector type, which says the vision rules.
        prefixes: of stock names: text, head, vision, projector.
        deepstack: the tower's layers whose features go to the decoder, in order: the file counts layers, the model
            counts features.
    """

    architecture: Architecture
    projector: str
    prefixes: tuple[str, str, str, str]
    deepstack: Sequence[int] = ()

    def _rules(self) -> tuple[Mapping[str, tuple[str, ...]], ...]:
        own = _PROJECTOR if self.architecture is LLAVA else {}
        return TEXT, HEAD, self.architecture.projectors.get(self.projector, {}), own

    def in_file(self, stock: str) -> tuple[str, ...]:
        """The tensors of the files that hold ``stock``; ``FormatError`` if none can."""
        for prefix, rules in zip(self.prefixes, self._rules(), strict=True):
            if stock.startswith(prefix):
                rest = stock.removeprefix(prefix)
                targets = rules.get(NUMBER.sub("N", rest, count=1)) or rules.get(rest)
                if targets:
                    number = NUMBER.search(rest)
                    return tuple(self._numbered(t, int(number[0]) if number else 0) for t in targets)
        raise FormatError(f"gguf has no place for tensor {stock} in a model of architecture {self.architecture.name}")

    def _numbered(self, target: str, number: int) -> str:
        if target.startswith("v.deepstack."):
            if number >= len(self.deepstack):
                raise FormatError(f"deepstack merger {number} has no layer in deepstack_visual_indexes")
            number = self.deepstack[number]
        return target.replace(".N.", f".{number}.")

    def of_files(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Stock name -> tensors of the files, for every tensor in ``names``; ``FormatError`` names a strange one."""
        stock: dict[str, tuple[str, str]] = {}
        for prefix, rules in zip(self.prefixes, self._rules(), strict=True):
            stock.update({target: (prefix, rest) for rest, targets in rules.items() for target in targets})
        present, found = set(names), {}
        for name in present:
            prefix, rest = stock.get(name) or stock.get(NUMBER.sub("N", name, count=1)) or ("", "")
            if not rest:
                raise FormatError(f"gguf tensor {name} is no part of architecture {self.architecture.name}")
            number = NUMBER.search(name)
            index = int(number[0]) if number else 0
            if name.startswith("v.deepstack."):
                if index not in self.deepstack:
                    raise FormatError(f"gguf tensor {name} is of a layer that is_deepstack_layers does not name")
                index = list(self.deepstack).index(index)
            whole = prefix + re.sub(r"\.N\.", f".{index}.", rest)
            found[whole] = self.in_file(whole)
        if missing := {target for targets in found.values() for target in targets} - present:
            raise FormatError(f"gguf tensor {min(missing)} is missing, though others of its module are there")
        return found


def prefixes_of(architecture: Architecture, names: Iterable[str]) -> tuple[str, str, str, str]:
    """The prefixes that a model's tensors have, read off one tensor each."""
    anchors = ("embed_tokens.weight", "lm_head.weight", architecture.vision_anchor, "linear_1.weight")
    names = list(names)
    found = []
    for anchor, default in zip(anchors, architecture.prefixes, strict=True):
        matching = [name for name in names if name == anchor or name.endswith(f".{anchor}")]
        found.append(min(matching, key=len).removesuffix(anchor) if matching else default)
    return found[0], found[1], found[2], found[3]
