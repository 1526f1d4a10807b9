"""Columns of a benchmark's file: which there must be, of which type, and what a cell of a stranger's file means.

The same benchmark is stored in several ways: options as a list or as the text of one (``"['a', 'b']"``), whole numbers
as text, an empty cell as null, NaN or the text ``nan``, a picture as bytes, as ``{"bytes", "path"}`` (Hugging Face), as
base64 (TSV) or as a path. All of these are read; text itself is left as it is, HTML entities included, since every
peer's prompt shows it so. Only ``strict`` comparisons look through entities.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grace_vlm.errors import DataError

CellType = Literal["text", "integer", "list", "picture"]
EXPECTED: Mapping[CellType, str] = {
    "text": "text or a number",
    "integer": "a whole number",
    "list": "a list of texts, or the text of one",
    "picture": "a picture: bytes, {bytes, path}, base64 or a path",
}


@dataclass(frozen=True)
class Column:
    """One column that a task reads.

    Args:
        optional: the column may be absent. nullable: cells may be empty.
    """

    name: str
    type: CellType = "text"
    optional: bool = False
    nullable: bool = False


def check_names(columns: Iterable[Column], found: Iterable[str], file: Path, task: str) -> None:
    """
    Raises:
        DataError: a column is not there.
    """
    names = list(found)
    missing = [column.name for column in columns if not column.optional and column.name not in names]
    if missing:
        what = "column" if len(missing) == 1 else "columns"
        raise DataError(
            f"{file} has no {what} {', '.join(map(repr, missing))}, which {task} needs; "
            f"its columns are {', '.join(names)}: rename the right one, or give another file"
        )


def is_empty(value: object) -> bool:
    """Null, NaN, empty text, or the text ``nan``. Pandas would also drop ``None``, ``NA`` and ``null``, which are
    answers that a question may have."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in ("", "nan")


@dataclass(frozen=True)
class Cells:
    """One row: cells by column, and where it stands. Every method raises ``DataError`` that names file, row, column."""

    file: Path
    row: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"row {self.row} of {self.file}"

    def fault(self, column: str, expected: str) -> DataError:
        shown = repr(self.values.get(column))
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return DataError(f"{self.place} has {shown} in the column {column!r}; expected {expected}: correct the file")

    def optional_text(self, column: str) -> str | None:
        """As text; None where the column is absent or the cell empty."""
        value = self.values.get(column)
        if is_empty(value):
            return None
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, str | int | float):
            return str(value)
        raise self.fault(column, EXPECTED["text"])

    def text(self, column: str) -> str:
        value = self.optional_text(column)
        if value is None:
            raise self.fault(column, EXPECTED["text"])
        return value

    def integer(self, column: str) -> int:
        value = self.text(column).strip()
        digits = value.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            raise self.fault(column, EXPECTED["integer"])
        return int(value)

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts, which may be written as one text; an empty cell is an empty list."""
        value = self.values.get(column)
        if isinstance(value, str) and not is_empty(value):
            value = literal(value)
        elif is_empty(value):
            value = []
        if not isinstance(value, list | tuple) or not all(isinstance(one, str | int | float) for one in value):
            raise self.fault(column, EXPECTED["list"])
        return tuple(str(one) for one in value)

    def raw(self, column: str) -> bytes:
        """The bytes of a picture cell."""
        value = self.values.get(column)
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if isinstance(value, str) and not is_empty(value):
            return self._decoded(column, value)
        raise self.fault(column, EXPECTED["picture"])

    def _decoded(self, column: str, value: str) -> bytes:
        """Base64, or a path below the file's folder. Anything that is a file there is a path."""
        with contextlib.suppress(OSError):  # base64 may be longer than any name
            path = inside(self.file.parent, value) if len(value) < 1024 else None
            if path is not None and path.is_file():
                return path.read_bytes()
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise self.fault(column, EXPECTED["picture"]) from None


def has_picture(value: object) -> bool:
    """Whether a picture cell holds one."""
    if isinstance(value, Mapping):
        return bool(value.get("bytes")) or not is_empty(value.get("path"))
    return not is_empty(value) and value != b""


def literal(text: str) -> Any:
    """The Python literal that ``text`` is, or ``text`` itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def inside(root: Path, name: str) -> Path | None:
    """``root / name``, or None where that leaves ``root`` or is no path at all."""
    try:
        path = (root.resolve() / name).resolve()
    except (OSError, RuntimeError, ValueError):
        return None
    return path if path.is_relative_to(root.resolve()) else None
