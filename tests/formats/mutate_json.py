"""Damage to JSON files: as trees of values, and as text where no tree could say it."""

from __future__ import annotations

import json
import random
from typing import Any

from hostile_values import NUMBERS, RAW_JSON, STRINGS, changed_bytes, hostile

_MARK = "@@raw@@"
_TELLING = (
    *(
        "num_bits",
        "bits",
        "group_size",
        "zero_point",
        "version",
        "quant_method",
        "checkpoint_format",
        "sym",
        "desc_act",
    ),
    *("format", "type", "symmetric", "strategy", "dynamic", "actorder", "scheme", "scale_rounding", "out_features"),
    *("in_features", "name", "modules", "mode", "qat", "scale_dtype", "weight_map", "model_type", "architectures"),
    *("quantization_config", "quantization", "awq_packing", "config_groups", "weights", "format_version", "linears"),
    *("bf16", "root", "shape", "codes", "scale", "values", "tensors", "text_config", "vision_config", "vocab_size"),
    *("pack_dtype", "rope_parameters", "hidden_size", "num_attention_heads", "depth", "image_mean", "vocab", "merges"),
)
"""Keys that readers look at: half of the damage is done to these."""


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value below ``tree``."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    return found


def _swapped_type(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return int(bool(value))
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, dict) else {str(i): item for i, item in enumerate(value)}


def _in_tree(tree: Any, rng: random.Random) -> tuple[str, bytes]:
    nodes = _nodes(tree)
    telling = [node for node in nodes if node[1] in _TELLING]
    container, key = rng.choice(telling if telling and rng.random() < 0.5 else nodes)
    raw = "null"
    what = rng.choice(("delete", "rename", "double", "type", "value", "value", "number", "raw", "nest", "swap", "add"))
    in_object = isinstance(container, dict)
    if what == "delete":
        del container[key]
    elif what == "rename" and in_object:
        container[rng.choice((*STRINGS, *_TELLING))] = container.pop(key)
    elif what == "double" and in_object:
        container[_MARK] = rng.choice((container[key], hostile(rng)))
        raw = json.dumps(key)
    elif what == "type":
        container[key] = _swapped_type(container[key])
    elif what == "number":
        container[key] = rng.choice(NUMBERS)
    elif what == "raw":
        container[key], raw = _MARK, rng.choice(RAW_JSON)
    elif what == "nest":
        depth, (left, right) = rng.choice((3, 60, 300, 900, 50_000)), rng.choice((("[", "]"), ('{"a":', "}")))
        container[key], raw = _MARK, left * depth + "1" + right * depth
    elif what == "swap":
        other, there = rng.choice(nodes)
        container[key], other[there] = json.loads(json.dumps((other[there], container[key])))
    elif what == "add" and in_object:
        container[rng.choice((*STRINGS, *_TELLING))] = hostile(rng)
    else:
        what, container[key] = "value", hostile(rng)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5).replace(f'"{_MARK}"', raw)
    return f"{what} {str(key)[:80]!r}", text.encode("utf-8", "surrogatepass")


def _as_text(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    texts = {
        "empty": b"",
        "null": b"null",
        "list": b"[" + raw + b"]",
        "number": b"7",
        "no braces": raw.strip()[1:-1],
        "cut": raw[: rng.randrange(len(raw))],
        "not UTF-8": raw.replace(b"a", b"\xff", 1),
        "UTF-16": raw.decode("utf-8").encode("utf-16"),
        "byte order mark": b"\xef\xbb\xbf" + raw,
        "twice": raw + raw,
        "zeros": bytes(len(raw)),
        "brackets": b"[" * 100_000,
    }
    what = rng.choice(list(texts))
    return what, texts[what]


def mutate_json(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the damaged file)."""
    kind = rng.random()
    if kind < 0.12:
        return changed_bytes(raw, rng)
    if kind < 0.22:
        return _as_text(raw, rng)
    said, data = _in_tree(json.loads(raw), rng)
    if rng.random() < 0.15:
        try:
            more, data = _in_tree(json.loads(data), rng)
        except (ValueError, RecursionError):  # the first damage is beyond what can be parsed
            return said, data
        said = f"{said}, then {more}"
    return said, data
