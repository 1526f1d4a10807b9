"""Damage to GGUF files: taken apart by a reader of its own, changed, and put together again."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field, replace

from hostile_values import STRINGS, changed_bytes

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_BIG = (0, 1, 2, 31, 65_535, 65_537, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1)
_SCALES = (0x7E00, 0x7C00, 0xFC00, 0x0000, 0x8000, 0xBC00, 0x0001, 0x7BFF, 0x3C00)


@dataclass
class Entry:
    """A value of the header as bytes after its key."""

    key: bytes
    kind: int
    raw: bytes


@dataclass
class Line:
    """A line of the table of tensors; ``sizes`` fastest first."""

    name: bytes
    sizes: list[int]
    kind: int
    offset: int


@dataclass
class File:
    """All of a file."""

    entries: list[Entry]
    lines: list[Line]
    data: bytearray
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None
    key_lengths: dict[int, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        num_lines, num_entries = self.counts or (len(self.lines), len(self.entries))
        parts = [self.magic, struct.pack("<IQQ", self.version, num_lines, num_entries)]
        for index, entry in enumerate(self.entries):
            length = self.key_lengths.get(index, len(entry.key))
            parts += [struct.pack("<Q", length), entry.key, struct.pack("<I", entry.kind), entry.raw]
        for line in self.lines:
            parts += [struct.pack("<Q", len(line.name)), line.name, struct.pack("<I", len(line.sizes))]
            parts += [struct.pack(f"<{len(line.sizes)}Q", *line.sizes), struct.pack("<IQ", line.kind, line.offset)]
        head = b"".join(parts)
        return head + bytes(-len(head) % 32) + bytes(self.data)


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, spelling: str) -> int:
        value: int = struct.unpack("<" + spelling, self.take(struct.calcsize("<" + spelling)))[0]
        return value

    def string(self) -> bytes:
        return self.take(self.number("Q"))

    def value(self, kind: int) -> bytes:
        begin = self.at
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            for _ in range(count):
                self.value(inner)
        else:
            self.take(_WIDTHS[kind])
        return self.raw[begin : self.at]


def take_apart(raw: bytes) -> File:
    """A sound file with alignment 32."""
    reader = _Reader(raw)
    reader.take(8)
    num_lines, num_entries = reader.number("Q"), reader.number("Q")
    entries = []
    for _ in range(num_entries):
        key, kind = reader.string(), reader.number("I")
        entries.append(Entry(key, kind, reader.value(kind)))
    lines = []
    for _ in range(num_lines):
        name, rank = reader.string(), reader.number("I")
        sizes = [reader.number("Q") for _ in range(rank)]
        lines.append(Line(name, sizes, reader.number("I"), reader.number("Q")))
    reader.at += -reader.at % 32
    return File(entries, lines, bytearray(raw[reader.at :]))


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _head(file: File, rng: random.Random) -> str:
    what = rng.choice(("magic", "version", "counts", "key length", "alignment"))
    if what == "magic":
        file.magic = rng.choice((b"GGML", b"FUGG", b"\0\0\0\0", b"GGU"))
    elif what == "version":
        file.version = rng.choice((0, 1, 2, 4, 1 << 24, (1 << 32) - 1))
    elif what == "counts":
        counts = [len(file.lines), len(file.entries)]
        which = rng.randrange(2)
        counts[which] = rng.choice((*_BIG, counts[which] - 1, counts[which] + 1)) % (1 << 64)
        file.counts = (counts[0], counts[1])
    elif what == "key length" and file.entries:
        file.key_lengths[rng.randrange(len(file.entries))] = rng.choice(_BIG)
    else:
        kind, value = rng.choice(
            ((4, struct.pack("<I", rng.choice((0, 1, 8, 16, 33, 64, 4096, 1 << 31)))), (8, _string(b"32")))
        )
        file.entries.append(Entry(b"general.alignment", kind, value))
    return what


def _value(file: File, rng: random.Random) -> str:
    index = rng.randrange(len(file.entries))
    telling = [
        i for i, e in enumerate(file.entries) if e.key.startswith((b"grace.", b"general.arch", b"clip.", b"llama."))
    ]
    if telling and rng.random() < 0.5:
        index = rng.choice(telling)
    entry = file.entries[index]
    what = rng.choice(("drop", "double", "kind", "number", "string", "array", "nested", "length", "rename", "raw"))
    if what == "drop":
        del file.entries[index]
    elif what == "double":
        file.entries.append(rng.choice((replace(entry), Entry(entry.key, 4, bytes(4)))))
    elif what == "kind":
        entry.kind = rng.choice((*range(13), 13, 255, 1 << 31))
    elif what == "number":
        entry.kind = rng.choice((4, 5, 6, 7, 10, 11, 12))
        entry.raw = rng.choice((b"\0", b"\xff", b"\x7f", b"\x20\0", rng.randbytes(1))).ljust(_WIDTHS[entry.kind], b"\0")
        entry.raw = entry.raw[: _WIDTHS[entry.kind]]
    elif what == "string":
        entry.kind = _STRING
        entry.raw = _string(
            rng.choice((rng.choice(STRINGS).encode("utf-8", "surrogatepass"), b"\xff\xfe", b"llama", b"clip"))
        )
    elif what == "array":
        kind, count = rng.choice((0, 4, 5, 6, 7, 8, 9, 10, 77)), rng.choice((*_BIG, 3, 4))
        entry.kind, entry.raw = (
            _ARRAY,
            struct.pack("<IQ", kind, count) + rng.randbytes(min(count, 4) * _WIDTHS.get(kind, 8)),
        )
    elif what == "nested":
        depth = rng.choice((1, 10, 5000))
        entry.kind, entry.raw = _ARRAY, struct.pack("<IQ", _ARRAY, 1) * depth + struct.pack("<IQB", 0, 1, 7)
    elif what == "length" and entry.kind in (_STRING, _ARRAY):
        at = 0 if entry.kind == _STRING else 4
        entry.raw = entry.raw[:at] + struct.pack("<Q", rng.choice(_BIG)) + entry.raw[at + 8 :]
    elif what == "rename":
        entry.key = rng.choice(STRINGS).encode("utf-8", "surrogatepass")
    else:
        entry.raw = changed_bytes(entry.raw, rng)[1]
    return f"{what} of value {entry.key[:60]!r}"


def _line(file: File, rng: random.Random) -> str:
    if not file.lines:
        return _head(file, rng)
    index = rng.randrange(len(file.lines))
    line, other = file.lines[index], rng.choice(file.lines)
    what = rng.choice(
        ("sizes", "sizes", "rank", "kind", "kind", "offset", "name", "double", "drop", "exchange", "order")
    )
    if what == "sizes":
        line.sizes[rng.randrange(len(line.sizes))] = rng.choice((*_BIG, line.sizes[0] * 2, line.sizes[0] // 2, 32))
        if rng.random() < 0.3:
            line.sizes.reverse()
    elif what == "rank":
        line.sizes = rng.choice(
            ([], [1] * 5, [1] * 70, [*line.sizes, 1], [1, *line.sizes], [1 << 32] * 4, line.sizes[::-1])
        )
    elif what == "kind":
        line.kind = rng.choice((0, 1, 2, 8, 30, 3, 12, 14, 255, 1 << 31))
    elif what == "offset":
        line.offset = rng.choice(
            (*_BIG, line.offset + 1, line.offset + 32, line.offset - 32, other.offset, len(file.data))
        )
        line.offset %= 1 << 64
    elif what == "name":
        known = (
            b"output.weight",
            b"blk.0.attn_q.weight",
            b"blk.7.attn_q.weight",
            b"v.deepstack.0.fc1.weight",
            b"rope_freqs.weight",
        )
        line.name = rng.choice(
            (*known, line.name + b"x", rng.choice(STRINGS).encode("utf-8", "surrogatepass"), b"\xff")
        )
    elif what == "double":
        file.lines.append(replace(line, offset=rng.choice((line.offset, len(file.data)))))
    elif what == "drop":
        del file.lines[index]
    elif what == "exchange":
        line.name, other.name = other.name, line.name
    else:
        rng.shuffle(file.lines)
    return f"{what} of tensor {line.name[:60]!r}"


def _data(file: File, rng: random.Random) -> str:
    if not file.lines or not file.data:
        return _head(file, rng)
    quantized = [line for line in file.lines if line.kind in (2, 8)]
    if quantized and rng.random() < 0.7:
        line = rng.choice(quantized)
        block = 18 if line.kind == 2 else 34
        num_blocks = line.sizes[0] * line.sizes[1] // 32
        what, value = rng.choice(("one", "group", "all")), struct.pack("<H", rng.choice(_SCALES))
        chosen = {"one": [rng.randrange(num_blocks)], "group": range(min(4, num_blocks)), "all": range(num_blocks)}[
            what
        ]
        for number in chosen:
            at = line.offset + number * block
            file.data[at : at + 2] = value
        return f"{what} scale {value.hex()} of {line.name!r}"
    at = rng.randrange(len(file.data))
    file.data[at : at + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", rng.randbytes(4)))
    return f"data at {at}"


def mutate_gguf(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the damaged file)."""
    kind = rng.random()
    if kind < 0.15:
        return changed_bytes(raw, rng)
    if kind < 0.22:
        at = rng.randrange(len(raw))
        return f"cut at {at}", raw[:at]
    file = take_apart(raw)
    said = rng.choice((_head, _value, _value, _line, _line, _data, _data))(file, rng)
    return said, file.to_bytes()
