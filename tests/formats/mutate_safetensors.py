"""Damage to safetensors files: to the header and its length, to the table of tensors, and to their values."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from hostile_values import RAW_JSON, STRINGS, changed_bytes, hostile

_MARK = "@@raw@@"
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
}
_OTHER_DTYPES = ("F4", "F6_E2M3", "F128", "bf16", "", "I4", "Q4_0")
_FLOATS = {
    "BF16": ("H", (0x7FC0, 0x7F80, 0xFF80, 0x0000, 0x8000, 0xBF80, 0x0001, 0x8001, 0x7F7F, 0x3F80)),
    "F16": ("H", (0x7E00, 0x7C00, 0xFC00, 0x0000, 0x8000, 0xBC00, 0x0001, 0x8001, 0x7BFF, 0x3C00)),
    "F32": (
        "I",
        (0x7FC00000, 0x7F800000, 0xFF800000, 0, 0x80000000, 0xBF800000, 1, 0x80000001, 0x7F7FFFFF, 0x3F800000),
    ),
}
"""Patterns of NaN, Inf, -Inf, 0, -0, -1, the smallest denormals, the largest number and 1."""


_TWICE = ("dtype", "shape", "exchange")
_ONCE = ("offsets", "rename", "drop", "drop with data", "extra", "double", "raw", "value", "metadata", "order", "alias")


def take_apart(raw: bytes) -> tuple[dict[str, Any], bytearray]:
    """(header, data) of a sound file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def put_together(header: Any, data: bytes, raw: str = "null") -> bytes:
    text = json.dumps(header, ensure_ascii=False).replace(f'"{_MARK}"', raw).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _length(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    length = int.from_bytes(raw[:8], "little")
    value = rng.choice(
        (0, 1, 2, 8, length - 1, length + 1, len(raw), 100 << 20, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1)
    )
    return f"header length {value}", value.to_bytes(8, "little") + raw[8:]


def _shape(shape: list[int], rng: random.Random) -> list[Any]:
    count = 1
    for size in shape:
        count *= size
    return rng.choice(
        (
            *(shape[::-1], [count], [1, *shape], [*shape, 1], [], [0], [*shape, 0], [-1], [-size for size in shape]),
            *(
                [1 << 62, 4],
                [1 << 63],
                [(1 << 64) - 1, 2],
                [count // 2, 2],
                [2, count // 2],
                [size + 1 for size in shape],
            ),
            *([1.5], ["2"], [True], [[1]], [1] * 70),
        )
    )


def _offsets(begin: int, end: int, size: int, rng: random.Random) -> list[Any]:
    return rng.choice(
        (
            *(
                [end, begin],
                [begin, end + 8],
                [begin + 1, end],
                [begin, end - 1],
                [0, end],
                [begin, size],
                [size, size],
            ),
            *(
                [begin + size, end + size],
                [-8, end],
                [1 << 63, (1 << 63) + end - begin],
                [0, (1 << 64) - 1],
                [begin],
                [],
            ),
            *([begin, end, end], [float(begin), float(end)], [str(begin), end], [0, 0]),
        )
    )


def _table(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One line of the header, or two that are exchanged."""
    header, data = take_apart(raw)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return changed_bytes(raw, rng)
    name, other = rng.choice(names), rng.choice(names)
    entry, text = header[name], "null"
    begin, end = entry["data_offsets"]
    what = rng.choice((*_TWICE, *_TWICE, *_ONCE))
    if what == "dtype":
        same = [dtype for dtype, width in _WIDTHS.items() if width == _WIDTHS.get(entry["dtype"])]
        entry["dtype"] = rng.choice(same if rng.random() < 0.7 else [*_WIDTHS, *_OTHER_DTYPES])
    elif what == "shape":
        entry["shape"] = _shape(entry["shape"], rng)
    elif what == "offsets":
        entry["data_offsets"] = _offsets(begin, end, len(data), rng)
    elif what == "exchange":  # two tensors change names; often they fit
        alike = [n for n in names if header[n]["shape"] == entry["shape"] and n != name]
        other = rng.choice(alike) if alike else other
        header[name], header[other] = header[other], header[name]
    elif what == "rename":
        header[rng.choice((*STRINGS, f"{name}x", name.replace("layers.0", "layers.1"), f"{other}.{name}"))] = (
            header.pop(name)
        )
    elif what == "drop":
        del header[name]
    elif what == "drop with data":
        del header[name], data[begin:end]
        for line in header.values():
            if "data_offsets" in line and line["data_offsets"][0] >= end:
                line["data_offsets"] = [offset - (end - begin) for offset in line["data_offsets"]]
    elif what == "extra":
        parts = (
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "qweight",
            "scales",
            "biases",
            "g_idx",
            "bias",
            "codes",
        )
        extra = rng.choice((*STRINGS, f"{name.rpartition('.')[0]}.{rng.choice(parts)}", f"ghost.{rng.choice(parts)}"))
        header[extra] = {**entry, "data_offsets": [len(data), len(data) + end - begin]}
        data += data[begin:end]
    elif what == "alias":
        header[f"{name}.again"] = dict(entry)
    elif what == "double":
        header[_MARK], text = rng.choice((dict(entry), dict(header[other]))), json.dumps(name)
    elif what == "raw":
        header[name], text = _MARK, rng.choice((*RAW_JSON, "[" * 1000 + "]" * 1000, "{}", "[]"))
    elif what == "value":
        entry[rng.choice(list(entry))] = hostile(rng)
    elif what == "metadata":
        header["__metadata__"] = rng.choice((hostile(rng), {"format": "pt", "a\nb": "\x1b"}, {"x": {"y": 1}}))
    else:
        header = dict(sorted(header.items(), key=lambda item: rng.random()))
    return f"{what} {name!r}", put_together(header, bytes(data), text)


def _values(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Some values of one tensor."""
    header, data = take_apart(raw)
    names = [name for name in header if name != "__metadata__"]
    if not names or not data:
        return changed_bytes(raw, rng)
    name = rng.choice(names)
    dtype, (begin, end) = header[name]["dtype"], header[name]["data_offsets"]
    width = _WIDTHS[dtype]
    at = begin + width * rng.randrange(max(1, (end - begin) // width))
    what = rng.choice(("one", "one", "bit", "all", "random", "zero"))
    if dtype in _FLOATS:
        spelling, patterns = _FLOATS[dtype]
        value = struct.pack("<" + spelling, rng.choice(patterns))
    else:
        value = rng.choice((bytes(width), b"\xff" * width, b"\x80" * width, b"\x7f" * width, rng.randbytes(width)))
    if what == "one":
        data[at : at + width] = value
    elif what == "bit" and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif what == "all":
        data[begin:end] = value * ((end - begin) // width)
    elif what == "random":
        data[begin:end] = rng.randbytes(end - begin)
    else:
        data[begin:end] = bytes(end - begin)
    return f"{what} value {value.hex()} of {name}", put_together(header, bytes(data))


def _header_text(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    length = int.from_bytes(raw[:8], "little")
    said, text = changed_bytes(raw[8 : 8 + length], rng)
    return f"header: {said}", len(text).to_bytes(8, "little") + text + raw[8 + length :]


def _file(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    header, data = take_apart(raw)
    files = {
        "empty file": b"",
        "header of a list": put_together([header], bytes(data)),
        "header of nothing": put_together({}, bytes(data)),
        "nothing": put_together({}, b""),
        "more data": raw + bytes(rng.choice((1, 8, 4096))),
        "cut": raw[: rng.randrange(len(raw))],
        "cut by one": raw[:-1],
        "half": raw[: len(raw) // 2],
        "spaces before": (int.from_bytes(raw[:8], "little") + 8).to_bytes(8, "little") + b" " * 8 + raw[8:],
    }
    what = rng.choice(list(files))
    return what, files[what]


def mutate_safetensors(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the damaged file)."""
    kinds = (_length, _table, _table, _table, _values, _values, _values, _header_text, _file, changed_bytes)
    return rng.choice(kinds)(raw, rng)
