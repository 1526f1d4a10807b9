"""Annotations on disk -> one ``Row``: ids, image paths, turns. No picture is decoded, only offsets stay in memory.

The one format is LLaVA's (also ShareGPT4V's): a JSON array of rows, or one row a line (JSONL). A row is::

    {"id": "0001", "image": "images/1.png",            relative to the root; a list of them where a row has several;
                                                       absent or null in a row of text only
     "conversations": [{"from": "human", "value": "<image>\\nhow many circles are there?"},
                       {"from": "gpt", "value": "3"}, ...]}      human and gpt in turn, ending with gpt

``RowFile`` scans the bytes once (never ``json.load`` of the whole), keeps offset and length of every element, 16 bytes
a row, and reads row i by seeking. Opening also parses each row once for its id, to find duplicates.

A row that cannot be used is a ``Fault`` with one of the kinds of ``KINDS``, in its own place: it is never dropped in
silence and never replaced by a neighbour. JSON is read strictly: a duplicate key, NaN or Infinity, or anything around
the object is a fault, and so is a lone surrogate, which no tokenizer can encode. Only a file without structure (an
array that does not end) is refused as a whole.

``<image>`` marks where a picture goes; the first marker is the first picture. A row has one marker a picture, all in
questions; where there is none at all we put the pictures first, as LLaVA's own training data does. Keys other than
``kind`` and ``form`` are ignored.
"""

from __future__ import annotations

import functools
import hashlib
import json
import posixpath
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grace_vlm.errors import DataError
from grace_vlm.media.image import DEFAULT_LIMITS, IMAGE_KINDS, ImageFault, ImageLimits, LoadedImage, load_image

IMAGE_MARKER = "<image>"
META_KEYS = ("kind", "form")
MAX_TEXT_BYTES = 1_000_000
MAX_ROW_BYTES = 16_000_000
_CHUNK_BYTES = 1 << 20
_ROLES = {"human": "user", "gpt": "assistant"}

KINDS = {
    **IMAGE_KINDS,
    "image_path_outside": "the path is absolute or leaves the root",
    "image_token_without_image": "a question has <image> but the row has no image",
    "too_many_image_tokens": "more <image> markers than the row has images, or one in an answer",
    "too_few_image_tokens": "fewer <image> markers than the row has images, but not none",
    "no_conversations": "conversations is absent, empty or no list of turns",
    "wrong_role": "a turn is not by the one whose turn it is, human or gpt",
    "answer_first": "the first turn is an answer",
    "empty_answer": "an answer has no text",
    "value_not_a_string": "the value of a turn is no string",
    "text_too_long": "a value, or the whole row, is longer than allowed",
    "duplicate_id": "an earlier row has the same id",
    "bad_json": "the row is not one complete, strict JSON object with an id",
    "bad_utf8": "the bytes are no UTF-8, or a string holds a lone surrogate",
}
"""Every kind of fault that a file can have, with its sentence. Training adds one of its own: too many tokens."""


@dataclass(frozen=True)
class Turn:
    """One turn: ``role`` is ``user`` or ``assistant``."""

    role: str
    text: str


@dataclass(frozen=True)
class Row:
    """One usable row. ``index`` is its place in the file from 0; ``images`` the paths as given, none for text only.

    The users' turns hold ``IMAGE_MARKER`` exactly once for each image, in order; no other turn does.
    """

    index: int
    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """One row that cannot be used: a line of the ledger. ``id`` is empty where it could not be read."""

    row: int
    id: str
    kind: str
    reason: str


class _Refused(Exception):
    """Raised inside this file where a check fails; becomes a ``Fault``."""

    def __init__(self, kind: str, reason: str, row_id: str = "") -> None:
        self.kind = kind
        self.reason = reason
        self.row_id = row_id


class RowFile:
    """Random access to the rows of one annotation file.

    Args:
        path: JSON array or JSONL, told apart by the first character. Blank lines of JSONL are not rows.
        root: the folder that image paths are relative to; the file's own folder when None.
        limits: of the pictures that ``load_image`` reads.

    Raises:
        DataError: the file is missing, holds no rows, or is an array that does not end.
    """

    def __init__(self, path: Path, root: Path | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.limits = limits
        if not self.path.is_file():
            raise DataError(f"{self.path} is no file; a JSON array or JSONL file of LLaVA rows is expected")
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder; the folder that image paths are relative to is expected")
        self._resolved_root = self.root.resolve()
        self._offsets, self._lengths = array("Q"), array("Q")
        for offset, length in scan_elements(self.path):
            self._offsets.append(offset)
            self._lengths.append(length)
        if not self._offsets:
            raise DataError(f"{self.path} holds no rows; a JSON array or JSONL file of LLaVA rows is expected")
        self._first_of = self._find_duplicates()

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Row | Fault]:
        """All rows in the file's order, each usable or a fault."""
        with self.path.open("rb") as file:
            for index in range(len(self)):
                yield self._row(file, index)

    @functools.cached_property
    def text_lengths(self) -> array[int]:
        """Characters of each row, 0 of a fault: what rows of one batch should have in common, known without a
        tokenizer. The first use parses the file."""
        return array("Q", (sum(len(turn.text) for turn in getattr(row, "turns", ())) for row in self))

    def row(self, index: int) -> Row | Fault:
        """Row ``index``, 0-based; safe from any thread or worker, since no handle stays open."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            return self._row(file, index)

    def load_image(self, row: Row, image: str) -> LoadedImage | Fault:
        """One of the row's pictures as upright RGB, or the fault that makes the row unusable."""
        try:
            return load_image(self._image_path(image), self.limits)
        except (ImageFault, _Refused) as error:
            return Fault(row.index, row.id, error.kind, f"{_show(image)}: {error.reason}")

    def _image_path(self, image: str) -> Path:
        try:
            path = (self._resolved_root / image).resolve()
        except (OSError, RuntimeError, ValueError):
            raise _Refused("image_missing", "no such file") from None
        if not path.is_relative_to(self._resolved_root):
            raise _Refused("image_path_outside", "a link leaves the root")
        return path

    def _row(self, file: BinaryIO, index: int) -> Row | Fault:
        try:
            row_id, record = _parse(self._read(file, index))
            if index in self._first_of:
                raise _Refused("duplicate_id", f"row {self._first_of[index]} has the same id", row_id)
            return _build(index, row_id, record)
        except _Refused as refused:
            return Fault(index, refused.row_id, refused.kind, refused.reason)

    def _read(self, file: BinaryIO, index: int) -> bytes:
        num_bytes = self._lengths[index]
        if num_bytes > MAX_ROW_BYTES:
            raise _Refused("text_too_long", f"the row has {num_bytes} bytes; at most {MAX_ROW_BYTES} are allowed")
        file.seek(self._offsets[index])
        return file.read(num_bytes)

    def _find_duplicates(self) -> dict[int, int]:
        """Row -> the first row with the same id. Ids are compared by 64-bit digests, 8 bytes a row."""
        digests = np.empty(len(self), np.uint64)
        with self.path.open("rb") as file:
            for index in range(len(self)):
                try:
                    key = "id:" + _parse(self._read(file, index))[0]
                except _Refused:
                    key = f"row:{index}"
                digests[index] = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        _, firsts, groups = np.unique(digests, return_index=True, return_inverse=True)
        first_of = firsts[groups]
        return {int(row): int(first_of[row]) for row in np.flatnonzero(first_of != np.arange(len(self)))}


def _parse(data: bytes) -> tuple[str, dict[str, Any]]:
    """The id and the record of one element."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused("bad_utf8", f"byte {error.start} of the row is no UTF-8") from None
    try:
        record = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _Refused("bad_json", f"the JSON breaks at character {error.pos} of {len(text)}") from None
    except RecursionError:
        raise _Refused("bad_json", "the JSON is nested too deeply") from None
    except ValueError:
        raise _Refused("bad_json", "a number has too many digits") from None
    if not isinstance(record, dict):
        raise _Refused("bad_json", "the row is no JSON object")
    row_id = record.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise _Refused("bad_json", "id is no string and no whole number" if "id" in record else "the row has no id")
    _num_bytes(str(row_id), "id", "")
    return str(row_id), record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _Refused("bad_json", "a key occurs twice in one object")
    return record


def _refuse_constant(name: str) -> None:
    raise _Refused("bad_json", f"{name} is no JSON")


def _build(index: int, row_id: str, record: Mapping[str, Any]) -> Row:
    given = record.get("image")
    images = tuple(given) if isinstance(given, list) else () if given is None else (given,)
    for image in images:
        _check_image_path(image, row_id)
    turns = _read_turns(record.get("conversations"), row_id)
    meta = {key: record[key] for key in META_KEYS if isinstance(record.get(key), str)}
    return Row(index, row_id, images, _place_markers(turns, len(images), row_id), meta)


def _check_image_path(image: object, row_id: str) -> None:
    if not isinstance(image, str):
        raise _Refused("bad_json", "image is no string; a relative path or a list of them is expected", row_id)
    _num_bytes(image, "image", row_id)
    normal = posixpath.normpath(image.replace("\\", "/"))
    if normal.startswith(("/", "../")) or normal == ".." or re.match("[A-Za-z]:", normal):
        raise _Refused("image_path_outside", f"{_show(image)}: {KINDS['image_path_outside']}", row_id)


def _read_turns(conversations: object, row_id: str) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        what = "empty" if conversations == [] else "absent" if conversations is None else "no list"
        raise _Refused("no_conversations", f"conversations is {what}", row_id)
    turns = [_read_turn(number, entry, row_id) for number, entry in enumerate(conversations)]
    if turns[-1].role != "assistant":
        raise _Refused("wrong_role", f"turn {len(turns) - 1}, the last, is by 'human'; 'gpt' is expected", row_id)
    return turns


def _read_turn(number: int, entry: object, row_id: str) -> Turn:
    if not isinstance(entry, dict):
        raise _Refused("no_conversations", f"turn {number} is no object with from and value", row_id)
    given, value = entry.get("from"), entry.get("value")
    expected = ("human", "gpt")[number % 2]
    if given == "gpt" and number == 0:
        raise _Refused("answer_first", "turn 0 is by 'gpt'; 'human' is expected", row_id)
    if given != expected:
        raise _Refused("wrong_role", f"turn {number} is by {_show(given)}; {expected!r} is expected", row_id)
    if not isinstance(value, str):
        raise _Refused("value_not_a_string", f"the value of turn {number} is no string", row_id)
    num_bytes = _num_bytes(value, f"the value of turn {number}", row_id)
    if num_bytes > MAX_TEXT_BYTES:
        reason = f"the value of turn {number} has {num_bytes} bytes; at most {MAX_TEXT_BYTES} are allowed"
        raise _Refused("text_too_long", reason, row_id)
    if expected == "gpt" and not value.strip():
        raise _Refused("empty_answer", f"the answer in turn {number} is empty", row_id)
    return Turn(_ROLES[expected], value)


def _place_markers(turns: list[Turn], num_images: int, row_id: str) -> tuple[Turn, ...]:
    """The turns with exactly one marker an image, in questions. A marker in an answer is one too many."""
    num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    in_answers = sum(turn.text.count(IMAGE_MARKER) for turn in turns if turn.role == "assistant")
    if num_markers and not num_images:
        raise _Refused("image_token_without_image", f"{num_markers} {IMAGE_MARKER} and no image", row_id)
    if num_markers == in_answers:
        turns[0] = Turn("user", f"{IMAGE_MARKER}\n" * num_images + turns[0].text)
        num_markers += num_images
    if num_markers != num_images or in_answers:
        kind = "too_few_image_tokens" if num_markers < num_images else "too_many_image_tokens"
        images = "1 image" if num_images == 1 else f"{num_images} images"
        raise _Refused(kind, f"{num_markers} {IMAGE_MARKER} for {images}", row_id)
    return tuple(turns)


def _num_bytes(text: str, what: str, row_id: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise _Refused("bad_utf8", f"{what} holds a lone surrogate", row_id) from None


def _show(value: object) -> str:
    """A stranger's value inside a reason: quoted, on one line, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# --- the scanner: bytes -> (offset, length) of every element ----------------------------------------------------------

_STRING_BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_OUTSIDE_ROW = re.compile(rb'["{}\[\],]')
_INSIDE_ROW = re.compile(rb'["{}\[\]]')
# Whole strings and what stands between them, in one step: most of a row.
_PLAIN = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)


def scan_elements(path: Path, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of every element of a JSON array, or of every line that is not blank.

    Memory is one chunk. The array scanner knows strings, escapes and depth, and nothing else of JSON: what stands
    between two commas of the outermost array is an element, to be judged by whoever parses it.
    """
    with path.open("rb") as file:
        start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        file.seek(start)
        while (byte := file.read(1)).isspace():
            start += 1
        file.seek(start)
        chunks = iter(lambda: file.read(chunk_bytes), b"")
        if byte != b"[":
            yield from _scan_lines(chunks, start)
            return
        elements = _scan_array(chunks, start, path)
        first = next(elements)
        second = next(elements, None)
        if second is None:
            file.seek(first[0])
            if not file.read(first[1]).strip():
                return
        yield first
        if second is not None:
            yield second
            yield from elements


def _scan_lines(chunks: Iterator[bytes], base: int) -> Iterator[tuple[int, int]]:
    start, is_blank = base, True
    for chunk in chunks:
        at = 0
        while (end := chunk.find(b"\n", at)) >= 0:
            if not is_blank or chunk[at:end].strip():
                yield start, base + end - start
            at = end + 1
            start, is_blank = base + at, True
        is_blank = is_blank and not chunk[at:].strip()
        base += len(chunk)
    if not is_blank:
        yield start, base - start


def _scan_array(chunks: Iterator[bytes], base: int, path: Path) -> Iterator[tuple[int, int]]:
    """Elements of the array that begins with the first byte; an empty array has one blank element."""
    depth, start, num_elements = 0, 0, 0
    in_string = is_escaped = False
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            if in_string:
                body = _STRING_BODY.match(chunk, at + is_escaped)
                at = body.end() if body else len(chunk)
                is_escaped = chunk[at : at + 1] == b"\\"  # the escaped byte is in the next chunk
                in_string = at == len(chunk) or is_escaped
                at += 1
                continue
            if depth >= 2:
                plain = _PLAIN.match(chunk, at)
                at = plain.end() if plain else at
            token = (_OUTSIDE_ROW if depth < 2 else _INSIDE_ROW).search(chunk, at)
            mark = token.group() if token else b""
            is_over = depth == 0 and num_elements > 0
            if (is_over and chunk[at:].strip()) or (depth == 1 and mark == b"}"):
                raise DataError(
                    f"{path} is not one JSON array of rows: something else stands after row {num_elements - 1}"
                )
            if token is None:
                break
            at = token.end()
            in_string = mark == b'"'
            if depth == 1 and mark in b",]":
                yield start, base + token.start() - start
                num_elements += 1
            depth += (mark in b"[{") - (mark in b"]}")
            if depth <= 1 and mark in b"[,":
                start = base + at
        base += len(chunk)
    if depth or in_string:
        raise DataError(f"{path} ends inside its array, after {num_elements} whole rows; fetch or write the file again")
