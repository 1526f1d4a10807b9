"""Downloaded LLaVA rows -> rows to train on: ``grace data prepare sharegpt4v|llava OUT --annotations F --images DIR``.

The folder::

    OUT/train.jsonl      one row a line; image paths stay relative to DIR, no picture is copied
    OUT/manifest.json    counts by sub-collection, SHA-256 of the rows and of F
    OUT/README.md        source, licence, counts

What is changed in a row, and nothing else: an id that an earlier row has gets ``-2``, ``-3``, ... (real mixes reuse
ids, ``RowFile`` refuses them), a row without one gets its number in F, ``images`` becomes ``image``, and OpenAI's
``messages`` become ``conversations``, less a system turn that stands first. What is no strict JSON object is copied
byte for byte: rows are judged by ``grace data check`` and in training, with a ledger, not here.

Every id and every byte of a row depends on F alone, not on which pictures are there. F is read twice, row by row: once
for its ids, so that no new id meets a later one, and once to write. Memory is the ids and the folders' file names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from grace_vlm.data.rows import MAX_ROW_BYTES, scan_elements
from grace_vlm.data.sources.prepare import check_place, staged_folder
from grace_vlm.errors import DataError

SOURCES = ("sharegpt4v", "llava")
Progress = Callable[[int, int, str], None]
_PROGRESS_EVERY_ROWS = 2_000
_ROLES = {"user": "human", "assistant": "gpt"}
_LICENCES = {
    "sharegpt4v": """the card of ShareGPT4V (https://huggingface.co/datasets/Lin-Chen/ShareGPT4V) puts the annotations
under CC BY-NC 4.0 and asks to abide by OpenAI's terms of use; its authors give the web pictures for academic use only.
The other pictures are under the terms of the data sets that they come from.""",
    "llava": "that of the annotations and of the pictures, as the place that you downloaded them from states it.",
}


@dataclass
class Collection:
    """One sub-collection: the rows that name a picture of it, and its different pictures."""

    num_rows: int = 0
    num_present: int = 0
    num_missing: int = 0


@dataclass
class RowsReport:
    """What was read and what became of it. ``num_outside`` rows have an image that is no path below the folder;
    ``num_copied`` are no strict JSON object and stay as they are, ``num_not_copied`` could not be lines of JSONL."""

    num_rows: int = 0
    num_written: int = 0
    num_text_rows: int = 0
    num_left_out: int = 0
    num_renamed_ids: int = 0
    num_numbered_ids: int = 0
    num_system_turns: int = 0
    num_outside: int = 0
    num_copied: int = 0
    num_not_copied: int = 0
    first_not_copied: str = ""
    collections: dict[str, Collection] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedRows:
    """What was written. ``root`` is what ``data.root`` must be; None for the rows' own folder."""

    out: Path
    source: str
    root: Path | None
    rows_sha256: str
    report: RowsReport


class PicturesMissing(DataError):
    """Pictures are missing and nobody said to leave their rows out; ``report`` has the counts."""

    def __init__(self, report: RowsReport, images: Path | None) -> None:
        self.report = report
        found = report.collections
        name = max(sorted(found), key=lambda name: found[name].num_missing)
        worst, num_missing = found[name], sum(one.num_missing for one in found.values())
        num_all = num_missing + sum(one.num_present for one in found.values())
        super().__init__(
            f"{num_missing} of {num_all} pictures are missing below {images}, most in {name}: {worst.num_missing} of "
            f"{worst.num_missing + worst.num_present}; download them, or pass --skip-missing to leave out "
            f"{_count(report.num_left_out, 'row')}"
        )


def prepare_conversations(
    source: str,
    out: Path,
    *,
    annotations: Path,
    images: Path,
    skip_missing: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedRows:
    """Make ``annotations`` and the pictures below ``images`` into the folder ``out``.

    Args:
        source: one of ``SOURCES``; it decides the licence note only.
        skip_missing: leave out rows whose pictures are missing.
        progress: called as ``progress(done, total, what)``.

    Raises:
        CheckpointError: an ``out`` that exists without ``overwrite``, or that must not be replaced.
        DataError: a file or folder that cannot be read, a file without rows.
        PicturesMissing: pictures are missing, without ``skip_missing``. ``out`` is then as it was.
    """
    out, annotations, images = Path(out), Path(annotations), Path(images)
    check_place(out, overwrite, (annotations, images))
    if not annotations.is_file() or not os.access(annotations, os.R_OK):
        raise DataError(f"{annotations} is no file that can be read; a JSON array or JSONL of LLaVA rows is expected")
    pictures = PictureFolder(images)
    tell = progress or (lambda done, total, what: None)
    with annotations.open("rb") as file:
        ids, offsets, lengths = _find_rows(annotations, file, tell)
        with staged_folder(out) as folder, RowsWriter(folder, ids, pictures, skip_missing) as writer:
            for index, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
                writer.add_bytes(index, _read(file, offset, length))
                if index % _PROGRESS_EVERY_ROWS == 0:
                    tell(index, len(offsets), "writing rows")
            file.seek(0)
            facts = {
                "annotations": annotations.name,
                "annotations_sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "images": str(images),
                "skip_missing": skip_missing,
            }
            rows_sha256 = writer.finish(source, facts, _LICENCES[source], str(annotations))
    return PreparedRows(out, source, images, rows_sha256, writer.report)


def _find_rows(path: Path, file: BinaryIO, tell: Progress) -> tuple[Ids, array[int], array[int]]:
    """All given ids, and where the rows of ``path`` begin and how long they are."""
    ids, offsets, lengths = Ids(), array("Q"), array("Q")
    num_bytes = path.stat().st_size
    for offset, length in scan_elements(path):
        offsets.append(offset)
        lengths.append(length)
        record = _parse(_read(file, offset, length))
        if record is not None:
            ids.reserve(record.get("id"))
        if len(offsets) % _PROGRESS_EVERY_ROWS == 0:
            tell(offset + length, num_bytes, "reading ids")
    if not offsets:
        raise DataError(f"{path} holds no rows; a JSON array or JSONL of LLaVA rows is expected")
    return ids, offsets, lengths


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    """The bytes of one element; of one that ``RowFile`` would refuse for its length only enough to see that."""
    file.seek(offset)
    return file.read(min(length, MAX_ROW_BYTES + 1))


class Ids:
    """Gives every row an id of its own. Reserve all given ids first, then assign in the rows' order."""

    def __init__(self) -> None:
        self._is_used: dict[str, bool] = {}
        self._last_number: dict[str, int] = {}

    def reserve(self, given: object) -> None:
        """Keep ``given`` for the first row that has it."""
        if _is_id(given):
            self._is_used.setdefault(str(given), False)

    def assign(self, index: int, given: object) -> object:
        """The id of row ``index``. What is neither an id nor absent stays: a fault that ``grace data check`` names."""
        is_given = _is_id(given)
        if not is_given and given is not None and given != "":
            return given
        wanted = str(given) if is_given else str(index)
        is_used = self._is_used.get(wanted)
        if is_used is None or (is_given and not is_used):
            self._is_used[wanted] = True
            return wanted
        number = self._last_number.get(wanted, 1) + 1
        while f"{wanted}-{number}" in self._is_used:
            number += 1
        self._last_number[wanted] = number
        self._is_used[f"{wanted}-{number}"] = True
        return f"{wanted}-{number}"


def _is_id(given: object) -> bool:
    return isinstance(given, str | int) and not isinstance(given, bool) and given != ""


class PictureFolder:
    """Which pictures there are below ``root``: every folder is listed once, however many rows name it.

    Raises:
        DataError: ``root`` is no folder; later, a folder that cannot be read or that a link takes out of ``root``.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is no folder; the folder that image paths start from is expected")
        self.root = root
        self._folders: dict[str, tuple[str, set[str]]] = {}
        self._seen: set[str] = set()

    def look_up(self, images: list[str], collections: dict[str, Collection]) -> bool | None:
        """True if all pictures of one row are there, None if a path leaves the root; counts them where they belong."""
        names = set()
        is_complete = True
        for image in images:
            folder, _, name = image.rpartition("/")
            if image.startswith("/") or posixpath.normpath(image).split("/")[0] == "..":
                return None
            if folder not in self._folders:
                self._folders[folder] = (_collection_of(folder), self._list(folder))
            collection_name, present = self._folders[folder]
            names.add(collection_name)
            is_present = name in present
            is_complete = is_complete and is_present
            if image not in self._seen:
                self._seen.add(image)
                collection = collections.setdefault(collection_name, Collection())
                collection.num_present += is_present
                collection.num_missing += not is_present
        for collection_name in names:
            collections[collection_name].num_rows += 1
        return is_complete

    def _list(self, folder: str) -> set[str]:
        path = self.root / folder
        try:
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise DataError(
                    f"{path} is a link that leaves {self.root}, and no picture outside is read; give the folder that "
                    "holds both as --images, or mount or move the pictures there"
                )
            with os.scandir(path) as entries:
                return {entry.name for entry in entries if entry.is_file()}
        except PermissionError:
            raise DataError(f"{path} cannot be read: permission denied; give yourself access to it") from None
        except (OSError, ValueError):
            return set()


def _collection_of(folder: str) -> str:
    """``llava/llava_pretrain/images`` also for ``llava/llava_pretrain/images/00453``: numbered folders are one."""
    return re.sub(r"(^|/)[0-9]+(/[0-9]+)*$", "", posixpath.normpath(folder)) or "."


class RowsWriter:
    """Writes ``train.jsonl`` of ``folder`` row by row; counts what it meets in ``report``.

    Args:
        ids: with every given id reserved.
        pictures: where the pictures are; None for rows whose pictures are files of ``folder``.
    """

    def __init__(self, folder: Path, ids: Ids, pictures: PictureFolder | None, skip_missing: bool) -> None:
        self.report = RowsReport()
        self._folder, self._ids, self._pictures, self._skip_missing = folder, ids, pictures, skip_missing
        self._file = (folder / "train.jsonl").open("wb")
        self._digest = hashlib.sha256()

    def __enter__(self) -> RowsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add_bytes(self, index: int, data: bytes) -> None:
        """One element of an annotation file, whatever it is."""
        record = _parse(data)
        if record is not None:
            self.add(index, record, data)
            return
        self.report.num_rows += 1
        self._copy(index, data)

    def add(self, index: int, record: Mapping[str, Any], data: bytes = b"") -> None:
        """One row; ``data`` is what it was read from, which is copied where JSON cannot say the row again."""
        self.report.num_rows += 1
        row, has_system_turn = _unify(record)
        given = row.get("id")
        unique = self._ids.assign(index, given)
        row = {**row, "id": unique} if "id" in row else {"id": unique, **row}
        self.report.num_numbered_ids += given is None or given == ""
        self.report.num_renamed_ids += _is_id(given) and str(given) != unique
        self.report.num_system_turns += has_system_turn
        if not self._count_pictures(row.get("image")):
            self.report.num_left_out += 1
            return
        try:
            # What JSON has no word for (of a Parquet file) becomes null, which is a fault in its place.
            line = json.dumps(row, allow_nan=False, default=lambda value: None).encode()
        except ValueError:  # 1e999, which Python reads as Infinity
            self._copy(index, data)
            return
        self._write(line)

    def _count_pictures(self, image: object) -> bool:
        """False if a picture is missing."""
        images: list[Any] = image if isinstance(image, list) else [] if image is None else [image]
        if not images:
            self.report.num_text_rows += 1
        elif not all(isinstance(path, str) for path in images):
            self.report.num_outside += 1
        elif self._pictures is None:
            own = self.report.collections.setdefault("images", Collection())
            own.num_rows, own.num_present = own.num_rows + 1, own.num_present + len(images)
        else:
            is_complete = self._pictures.look_up(images, self.report.collections)
            self.report.num_outside += is_complete is None
            return is_complete is not False
        return True

    def _copy(self, index: int, data: bytes) -> None:
        # A tab is white space to JSON where a line break is, and refused inside a string where a line break is.
        line = data.strip(b" \t\r\n").replace(b"\n", b"\t")
        starts_array = not self.report.num_written and line.startswith((b"[", b"\xef\xbb\xbf"))
        if starts_array or not line.strip() or len(data) > MAX_ROW_BYTES:
            self.report.num_not_copied += 1
            reason = "no first line of JSONL" if starts_array else "empty" if not line.strip() else "too long"
            self.report.first_not_copied = self.report.first_not_copied or f"row {index}: {reason}"
            return
        self.report.num_copied += 1
        self._write(line)

    def _write(self, line: bytes) -> None:
        if self.report.num_left_out and not self._skip_missing:
            return  # nothing will be published
        self.report.num_written += 1
        self._digest.update(line + b"\n")
        self._file.write(line + b"\n")

    def finish(self, source: str, facts: Mapping[str, Any], licence: str, given: str) -> str:
        """Close the rows and write about them; returns their SHA-256. ``given`` is what was read, for errors.

        Raises:
            PicturesMissing: see the class.
            DataError: there is nothing to train on.
        """
        self._file.close()
        report, rows_sha256 = self.report, self._digest.hexdigest()
        if report.num_left_out and not self._skip_missing:
            report.num_written = 0
            raise PicturesMissing(report, facts["images"])
        if report.num_rows == report.num_copied + report.num_not_copied:
            rows = _count(report.num_rows, "row")
            raise DataError(f"{given}: no JSON object among {rows}; a JSON array or JSONL of LLaVA rows is expected")
        if not report.num_written:
            raise DataError(f"{given}: all {_count(report.num_rows, 'row')} need pictures that are missing")
        manifest = {
            "source": source,
            **facts,
            "num_rows": {"train": report.num_written},
            "rows_sha256": {"train": rows_sha256},
            "counts": dataclasses.asdict(report),
        }
        (self._folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        (self._folder / "README.md").write_text(_readme(source, facts, licence, report), encoding="utf-8")
        return rows_sha256


def _parse(data: bytes) -> dict[str, Any] | None:
    """The row, or None where ``RowFile`` would not see a strict JSON object."""
    try:
        record = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and len(data) <= MAX_ROW_BYTES else None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unify(record: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row with LLaVA's keys, and whether a system turn was dropped. Odd values go through, to be judged later."""
    row = dict(record)
    if row.get("image") is None and row.get("images") is not None:
        row["image"] = row.pop("images")
    messages = row.get("messages")
    if row.get("conversations") is not None or not isinstance(messages, list):
        return row, False
    if not all(isinstance(message, dict) for message in messages):
        return row, False
    del row["messages"]
    has_system_turn = bool(messages) and messages[0].get("role") == "system"
    turns = [(str(message.get("role")), message.get("content")) for message in messages[has_system_turn:]]
    row["conversations"] = [{"from": _ROLES.get(role, role), "value": content} for role, content in turns]
    return row, has_system_turn


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _readme(source: str, facts: Mapping[str, Any], licence: str, report: RowsReport) -> str:
    facts_text = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    counts = {
        name.removeprefix("num_"): count for name, count in vars(report).items() if isinstance(count, int) and count
    }
    counts_text = "\n".join(f"- {name.replace('_', ' ')}: {count}" for name, count in counts.items())
    table = "\n".join(
        f"| {name} | {found.num_rows} | {found.num_present} | {found.num_missing} |"
        for name, found in sorted(report.collections.items())
    )
    return f"""# {source}

Made by `grace data prepare {source}`; made again from the same files it has the same bytes.
`train.jsonl` has one LLaVA row a line; `manifest.json` has its SHA-256.

{facts_text}
{counts_text}

Licence: {licence}

| sub-collection | rows | pictures | missing |
|---|---|---|---|
{table}
"""
