"""How the benchmarks are written: Parquet with Hugging Face's features, TSV with pictures in base64, JSON.

The same rows give the same bytes, for one installed pyarrow (its version stands in every file).
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from grace_vlm.errors import ConfigError

Rows = Sequence[Mapping[str, Any]]
_VALUES = ("string", "int64")


def import_pyarrow() -> ModuleType:
    """pyarrow with ``pyarrow.parquet``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "the toy suite has Parquet files and needs the package pyarrow, which is not installed; pip install pyarrow"
        ) from error
    module: ModuleType = pyarrow
    return module


def picture(png: bytes | None) -> dict[str, bytes | None] | None:
    """A picture as ``datasets`` stores it in a column of images."""
    return None if png is None else {"bytes": png, "path": None}


def write_parquet(path: Path, columns: Mapping[str, str], rows: Rows) -> None:
    """Write ``rows``, whose keys are ``columns``.

    Args:
        columns: name -> ``string``, ``int64``, ``strings`` (a list), ``image``, or ``{a,b}``: a struct of strings.
    """
    pyarrow = import_pyarrow()
    fields, features = [], {}
    for name, kind in columns.items():
        fields.append(pyarrow.field(name, _arrow_type(pyarrow, kind)))
        features[name] = _feature(kind)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema(fields, metadata=metadata)
    for row in rows:
        assert list(row) == list(columns), (list(row), list(columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), path, compression="snappy")


def _members(kind: str) -> list[str]:
    return kind.strip("{}").split(",")


def _arrow_type(pyarrow: ModuleType, kind: str) -> Any:
    if kind == "image":
        return pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    if kind == "strings":
        return pyarrow.list_(pyarrow.string())
    if kind.startswith("{"):
        return pyarrow.struct([(name, pyarrow.string()) for name in _members(kind)])
    assert kind in _VALUES, kind
    return pyarrow.string() if kind == "string" else pyarrow.int64()


def _feature(kind: str) -> Any:
    """The column in the words of ``datasets``."""
    if kind == "image":
        return {"_type": "Image"}
    if kind == "strings":
        return {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
    if kind.startswith("{"):
        return {name: {"dtype": "string", "_type": "Value"} for name in _members(kind)}
    return {"dtype": kind, "_type": "Value"}


def write_tsv(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write a table as pandas does: a header, tabs, quotes where needed; None is an empty cell, which reads as NaN."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        assert list(row) == list(columns), (list(row), list(columns))
        writer.writerow(["" if value is None else value for value in row.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.getvalue().encode())


def encode_picture(png: bytes) -> str:
    """Base64, as a cell of a TSV."""
    return base64.b64encode(png).decode("ascii")


def write_json(path: Path, document: Any) -> None:
    """A document, indented by one space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_picture(path: Path, png: bytes) -> None:
    """A picture in a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
