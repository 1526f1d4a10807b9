"""The GGUF container, version 3: a header of typed values, a table of tensors, then their bytes.

    "GGUF"  u32 version  u64 number of tensors  u64 number of values
    values  string key, u32 type, value                          string: u64 length, UTF-8
    table   string name, u32 rank, u64 sizes (fastest first), u32 type, u64 offset into the data
    data    begins at, and every tensor is padded to, a multiple of general.alignment (32)

All numbers are little-endian. A file is what a stranger wrote: every length is compared with what is left of the file
before anything is made of it, and tensors must follow one another without gap or overlap, as llama.cpp demands.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.shards import write_bytes

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_ITEMS = 65_536
"""Most tensors, and most values, of a file that is read."""
MAX_ELEMENTS = 8_000_000
"""Most elements of all arrays of a header: a vocabulary of 256k tokens takes about a million."""
MAX_HEADER_BYTES = 256 << 20

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type -> how ``struct`` spells it."""


class Kind(NamedTuple):
    """An element type: its number in a file, and the bytes that a block of weights takes."""

    name: str
    number: int
    block: int
    num_bytes: int


F32, F16, BF16 = Kind("F32", 0, 1, 4), Kind("F16", 1, 1, 2), Kind("BF16", 30, 1, 2)
Q4_0, Q8_0 = Kind("Q4_0", 2, 32, 18), Kind("Q8_0", 8, 32, 34)
_KINDS = {kind.number: kind for kind in (F32, F16, BF16, Q4_0, Q8_0)}
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


class Tensor(NamedTuple):
    """A line of the table; ``shape`` as PyTorch says it, rows first; ``offset`` from the beginning of the file."""

    kind: Kind
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.num_bytes


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _type_of(value: Any) -> int:
    """bool, u32, f32 or string for one value, i32 for the integers of an array: what llama.cpp asks for."""
    return _BOOL if isinstance(value, bool) else 4 if isinstance(value, int) else 6 if isinstance(value, float) else 8


def _encoded(value: Value) -> bytes:
    if not isinstance(value, list):
        kind = _type_of(value)
        return struct.pack("<I", kind) + (
            _string(value) if isinstance(value, str) else struct.pack("<" + _NUMBERS[kind], value)
        )
    kind = _type_of(value[0]) if value else 5
    kind = 5 if kind == 4 else kind
    head = struct.pack("<IIQ", _ARRAY, kind, len(value))
    if kind == _STRING:
        return head + b"".join(_string(str(item)) for item in value)
    return head + struct.pack(f"<{len(value)}{_NUMBERS[kind]}", *value)


def write_gguf(
    path: Path,
    values: Mapping[str, Value],
    tensors: Mapping[str, tuple[Kind, tuple[int, ...]]],
    load: Callable[[str], torch.Tensor],
) -> None:
    """Write one file, a tensor at a time.

    Args:
        tensors: name -> kind and shape (rows first). load: a tensor whose bytes are those of the file.
    """
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, value in values.items():
        try:
            header.append(_string(key) + _encoded(value))
        except (struct.error, OverflowError) as error:
            raise FormatError(f"gguf cannot hold {key} = {value!r}: {error}") from error
    offset = 0
    for name, (kind, shape) in tensors.items():
        header.append(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        header.append(struct.pack("<IQ", kind.number, offset))
        offset += padded(Tensor(kind, shape, 0).num_bytes)
    head = b"".join(header)
    with open(path, "wb") as file:
        file.write(head + bytes(padded(len(head)) - len(head)))
        for name, (kind, shape) in tensors.items():
            num_bytes, before = Tensor(kind, shape, 0).num_bytes, file.tell()
            write_bytes(file, load(name))
            if file.tell() - before != num_bytes:
                raise FormatError(f"{name} has {file.tell() - before} bytes, not the {num_bytes} of its header")
            file.write(bytes(padded(num_bytes) - num_bytes))


class _Header:
    """Reads typed values, never beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.elements = 0

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path} is no readable GGUF file: {what}")

    def bytes(self, count: int) -> bytes:
        end = self.file.tell() + count
        if end > min(self.size, MAX_HEADER_BYTES):
            raise self.fail(f"its header reaches byte {end} of {self.size}")
        return self.file.read(count)

    def number(self, spelling: str) -> Any:
        return struct.unpack("<" + spelling, self.bytes(struct.calcsize("<" + spelling)))[0]

    def string(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a string is not UTF-8 ({error.reason})") from error

    def value(self) -> Value:
        kind = self.number("I")
        if kind == _ARRAY:
            return self._array()
        return self._one(kind)

    def _one(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _NUMBERS:
            raise self.fail(f"a value has type {kind}; expected 0 to 12, no array in an array")
        return self.number(_NUMBERS[kind])

    def _array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise self.fail(f"its arrays have {self.elements} elements; at most {MAX_ELEMENTS} are read")
        if kind in _NUMBERS:
            width = struct.calcsize("<" + _NUMBERS[kind])
            return list(struct.unpack(f"<{count}{_NUMBERS[kind]}", self.bytes(count * width)))
        return [self._one(kind) for _ in range(count)]

    def tensor(self) -> tuple[str, Tensor]:
        name, rank = self.string(), self.number("I")
        if not 1 <= rank <= 4:
            raise self.fail(f"tensor {name!r} has {rank} axes; expected 1 to 4")
        sizes = tuple(self.number("Q") for _ in range(rank))
        number, offset = self.number("I"), self.number("Q")
        if number not in _KINDS:
            held = ", ".join(kind.name for kind in _KINDS.values())
            raise self.fail(f"tensor {name!r} has element type {number}; read are {held}")
        kind = _KINDS[number]
        if min(sizes) < 1 or math.prod(sizes) > 64 * self.size or sizes[0] % kind.block:
            raise self.fail(f"tensor {name!r} is {kind.name} {sizes[::-1]}, which does not fit its file or its blocks")
        return name, Tensor(kind, sizes[::-1], offset)


class GgufFile:
    """An opened file: ``values`` of its header, ``tensors`` by name; each is read when it is asked for.

    Raises:
        FormatError: it is damaged, cut short, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # a pipe would be waited for
            raise FormatError(f"{path} is no plain file; expected a GGUF file")
        try:
            with open(path, "rb") as file:
                self._read(_Header(path, file, path.stat().st_size))
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}") from error

    def _read(self, header: _Header) -> None:
        if header.bytes(4) != MAGIC:
            raise header.fail("it does not begin with GGUF")
        version, num_tensors, num_values = (header.number(spelling) for spelling in "IQQ")
        if version not in (2, 3):
            raise header.fail(f"it has version {version}; read are 2 and 3")
        if num_tensors > MAX_ITEMS or num_values > MAX_ITEMS:
            raise header.fail(f"it has {num_tensors} tensors and {num_values} values; at most {MAX_ITEMS} are read")
        self.values: dict[str, Value] = {}
        for _ in range(num_values):
            key = header.string()
            if key in self.values:
                raise header.fail(f"value {key!r} is there twice")
            self.values[key] = header.value()
        found: dict[str, Tensor] = {}
        for _ in range(num_tensors):
            name, tensor = header.tensor()
            if name in found:
                raise header.fail(f"tensor {name!r} is there twice")
            found[name] = tensor
        alignment = self.values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256, 4096):
            raise header.fail(f"general.alignment is {alignment!r}; expected a power of two from 8")
        begin, expected = padded(header.file.tell(), alignment), 0
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in found.items():
            if tensor.offset != expected:
                raise header.fail(f"tensor {name!r} begins at {tensor.offset} of the data; expected {expected}")
            expected += padded(tensor.num_bytes, alignment)
            self.tensors[name] = tensor._replace(offset=begin + tensor.offset)
            if begin + tensor.offset + tensor.num_bytes > header.size:
                raise header.fail(f"tensor {name!r} ends beyond the file; download or copy it again")

    def number(self, key: str, least: int = 1, most: int = 1 << 31) -> int:
        """An integer of the header; ``FormatError`` unless it is there and in range."""
        value = self.values.get(key)
        if type(value) is not int or not least <= value <= most:
            raise FormatError(f"{self.path} has {key} = {value!r}; expected an integer of at least {least}")
        return value

    def text(self, key: str) -> str:
        """A string of the header, empty if it has none."""
        value = self.values.get(key, "")
        if not isinstance(value, str):
            raise FormatError(f"{self.path} has {key} = {value!r}; expected a string")
        return value

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, uint8 (rows, bytes a row)."""
        tensor = self.tensors[name]
        flat = torch.empty(tensor.num_bytes, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(tensor.offset)
                num_read = file.readinto(flat.numpy().data)
        except OSError as error:
            raise FormatError(f"tensor {name} of {self.path} cannot be read: {error.strerror}") from error
        if num_read != tensor.num_bytes:
            raise FormatError(f"{self.path} became shorter while it was read; copy it again")
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of F32, F16 or BF16."""
        kind, shape, _ = self.tensors[name]
        return self.raw(name).reshape(-1).view(DTYPES[kind]).reshape(shape)
