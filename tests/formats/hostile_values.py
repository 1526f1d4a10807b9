"""Values that a careful stranger would put where a number, a name or a path is expected."""

from __future__ import annotations

import random
from typing import Any

STRINGS = (
    *("", " ", "../outside", "/etc/passwd", "..\\x", "a/b.safetensors", "model.safetensors", "model.safetensors\n"),
    *("a\0b", "a\nb", "\x1b[31mred", "\u202eback", "\ud800", "\u00e9", "x" * 10_000, "%s%n", "{0}", "__metadata__"),
    *("w4g32", "w8g32", "w4g0", "w4g31", "w3g32", "w4g" + "1" * 5000, "bf16", "fp32", "sig5", "float32", "bfloat16"),
    *("gptq", "gptq_v2", "awq", "compressed-tensors", "gemm", "GEMM", "gemv", "affine", "pack-quantized", "8", "32"),
    *("llava", "llava_llama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "LlavaLlamaForCausalLM", "default", "yarn"),
)
NUMBERS = (
    *(-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 128, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 31), -(1 << 63), 10**30, 0.0, -0.0, 0.5, 4.0, 32.0, 1e308),
)
RAW_JSON = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000, "0x10", "01", "'a'", "")
"""What stands in a text where no value of Python's could put it."""


def hostile(rng: random.Random) -> Any:
    """Any JSON-able value."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(STRINGS)
    if kind == 6:
        return rng.choice([None, True, False])
    if kind == 7:
        return [hostile(rng) for _ in range(rng.randrange(3))]
    if kind == 8:
        return {rng.choice(STRINGS): hostile(rng) for _ in range(rng.randrange(3))}
    return rng.randrange(-(1 << 65), 1 << 65)


def changed_bytes(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A few bytes flipped, put in, taken out, repeated or cut off, anywhere: what knows nothing of the format."""
    data, said = bytearray(raw), []
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        # Formats say the most at their beginning.
        end = min(len(data), rng.choice((16, 256, 4096, len(data))))
        at = rng.randrange(end) if end else 0
        what = rng.choice(("flip", "flip", "set", "insert", "delete", "repeat", "cut", "zero"))
        said.append(f"{what} at {at}")
        if what == "flip" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif what == "set" and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif what == "insert":
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif what == "delete":
            del data[at : at + rng.choice((1, 2, 8, 100))]
        elif what == "repeat":
            data[at:at] = data[at : at + rng.choice((1, 8, 64))]
        elif what == "cut":
            del data[at:]
        elif what == "zero":
            size = len(data[at : at + 8])
            data[at : at + size] = bytes(size)
    return ", ".join(said), bytes(data)
