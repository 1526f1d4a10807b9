"""A benchmark's files -> rows of ``Cells``. Parquet, TSV, JSON; a file, a folder, or an id on the Hub.

Pictures stay where they are: a row's picture is a ``Picture`` that reads its bytes when it is asked. Of Parquet one row
group is kept at a time, so that going through the rows in order reads every group once. Of TSV the base64 text is kept.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from grace_vlm.errors import ConfigError, DataError
from grace_vlm.evals.tasks.columns import Cells, Column, check_names, has_picture, inside
from grace_vlm.evals.tasks.task import About, Picture

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def local_source(source: str | Path, about: About) -> Path:
    """The file or folder itself, or the hub's files for an id, fetched.

    Raises:
        DataError: nothing is there, or the hub does not give it.
    """
    path = Path(source)
    if path.exists():
        return path
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise DataError(
            f"{source} does not exist; a file or folder in the layout of {about.title} is expected, "
            f"or the id of a data set on the Hub such as {about.source}"
        )
    from huggingface_hub import snapshot_download

    revision = about.revision if source == about.source else None
    try:
        found = snapshot_download(source, repo_type="dataset", revision=revision, allow_patterns=list(about.patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"{source} is no local path and cannot be fetched: {reason}; give a local folder") from error
    return Path(found)


def find_files(source: Path, *choices: Sequence[str], about: About) -> list[Path]:
    """The files of the first choice that has any. A choice is a list of patterns, each looked for in the folder, in its
    ``data`` and, for patterns with a ``/``, below. A source that is a file is that file.

    Raises:
        DataError: no choice has a file, or files that say how many of them there are (``...-00000-of-00003.parquet``)
            are not all there.
    """
    if source.is_file():
        return [source]
    for patterns in choices:
        found = [path for pattern in patterns for path in _matching(source, pattern)]
        if found:
            _require_all_shards(found)
            return found
    wanted = " or ".join(pattern for patterns in choices for pattern in patterns)
    raise DataError(f"{source} has no file {wanted}, which {about.title} is stored in; give the folder that has it")


def _matching(folder: Path, pattern: str) -> list[Path]:
    for place in (folder, folder / "data"):
        found = sorted(path for path in place.glob(pattern) if path.is_file())
        if found:
            return found
    return []


def _require_all_shards(found: Sequence[Path]) -> None:
    """By their names; a score of a part of a benchmark looks like one of all."""
    sets = {(path.parent, shard[1], shard[2]) for path in found if (shard := _SHARD.fullmatch(path.name))}
    for folder, stem, count in sorted(sets):
        wanted = [f"{stem}-{number:05d}-of-{count}.parquet" for number in range(int(count))]
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            there, others = len(wanted) - len(missing), ", ...," if len(missing) > 1 else ""
            raise DataError(
                f"{folder} has {there} of the {len(wanted)} files {stem}-*-of-{count}.parquet; "
                f"fetch {missing[0]}{others} too"
            )


def read_table(file: Path, columns: Sequence[Column], task: str) -> Iterator[tuple[Cells, dict[str, Picture]]]:
    """Rows of a Parquet or TSV file, told apart by the name: cells without pictures, and the pictures by column.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    if file.suffix == ".parquet":
        yield from _read_parquet(file, columns, task)
    elif file.suffix in (".tsv", ".csv"):
        yield from _read_tsv(file, columns, task)
    else:
        raise DataError(f"{file} is no .parquet and no .tsv file; {task} is stored in one of these")


def _read_parquet(file: Path, columns: Sequence[Column], task: str) -> Iterator[tuple[Cells, dict[str, Picture]]]:
    arrow, parquet = _parquet()
    try:
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        check_names(columns, names, file, task)
        pictures = [column for column in columns if column.type == "picture" and column.name in names]
        nullable = [column.name for column in pictures if column.nullable]
        plain = [column.name for column in columns if column.type != "picture" and column.name in names]
        groups = _RowGroups(file, [column.name for column in pictures])
        first = 0
        for group in range(opened.num_row_groups):
            num_rows = opened.metadata.row_group(group).num_rows
            rows = opened.read_row_group(group, columns=plain).to_pylist() if plain else [{}] * num_rows
            present = groups.present(group, nullable)
            for number, values in enumerate(rows):
                cells = Cells(file, first + number, values)
                there = [c.name for c in pictures if c.name not in present or present[c.name][number]]
                yield cells, {name: groups.picture(name, group, number, first + number) for name in there}
            first += num_rows
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(file, "Parquet", error) from None


class _RowGroups:
    """Picture columns of a Parquet file, one row group in memory. Any thread may read: what is kept changes at once."""

    def __init__(self, file: Path, columns: list[str]) -> None:
        self._file, self._columns = file, columns
        self._kept: tuple[int, dict[str, list[Any]]] = (-1, {})

    def _cells(self, group: int) -> dict[str, list[Any]]:
        number, cells = self._kept
        if group != number:
            arrow, parquet = _parquet()
            try:
                table = parquet.ParquetFile(self._file).read_row_group(group, columns=self._columns)
            except (arrow.ArrowException, OSError) as error:
                raise _unreadable(self._file, "Parquet", error) from None
            cells = {name: table.column(name).to_pylist() for name in self._columns}
            self._kept = group, cells
        return cells

    def present(self, group: int, names: list[str]) -> dict[str, list[bool]]:
        """For each row of a group, whether it has a picture."""
        if not names:
            return {}
        cells = self._cells(group)
        return {name: [has_picture(cell) for cell in cells[name]] for name in names}

    def picture(self, name: str, group: int, number: int, row: int) -> Picture:
        return Picture(name, f"row {row} of {self._file}", partial(self._read, name, group, number, row))

    def _read(self, name: str, group: int, number: int, row: int) -> bytes:
        return Cells(self._file, row, {name: self._cells(group)[name][number]}).raw(name)


def _read_tsv(file: Path, columns: Sequence[Column], task: str) -> Iterator[tuple[Cells, dict[str, Picture]]]:
    pictures = [column.name for column in columns if column.type == "picture"]
    names, rows = _tsv_rows(file)
    check_names(columns, names, file, task)
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(
                f"row {number} of {file} has {len(row)} cells; its {len(names)} columns need one each: fetch it again"
            )
        cells = Cells(file, number, dict(zip(names, row, strict=True)))
        there = [name for name in pictures if has_picture(cells.values.get(name))]
        yield cells, {name: Picture(name, cells.place, partial(cells.raw, name)) for name in there}


def _tsv_rows(file: Path) -> tuple[list[str], list[list[str]]]:
    limit = csv.field_size_limit(sys.maxsize)  # a picture is one field
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.reader(lines, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(file, "tab-separated", error) from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise DataError(f"{file} is empty; a first line with the names of its columns is expected")
    return rows[0], [row for row in rows[1:] if row]


def read_json(file: Path) -> Any:
    """A whole JSON file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, "JSON", error) from None


def picture_file(root: Path, name: str, cells: Cells, column: str) -> Picture:
    """A picture that is a file below ``root``.

    Raises:
        DataError: there is no such file, or its path leaves ``root``. No question is asked without its picture.
    """
    path = inside(root, name)
    if path is None or not path.is_file():
        what = "leaves that folder" if path is None else "is no file there"
        raise DataError(f"{cells.place} names the picture {name!r} in {root}, which {what}: fetch the pictures again")
    return Picture(column, cells.place, partial(_read_file, path))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, "a picture", error) from None


def _parquet() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "Parquet files need the package pyarrow, which is not installed; pip install pyarrow"
        ) from None
    return pyarrow, pyarrow.parquet


def _unreadable(file: Path, kind: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return DataError(f"{file} cannot be read as {kind}: {reason}; fetch it again")
