"""A Hugging Face data set with LLaVA's columns -> rows: ``grace data prepare hf OUT --dataset PATH_OR_ID``.

The columns: ``conversations`` (or OpenAI's ``messages``), ``image`` or ``images`` (or the one that is named), and,
where there are any, ``id``, ``kind`` and ``form``. A cell of the image column is a picture, a path, or a list of these.

Pictures that the data set holds are written as they are, undecoded, to ``OUT/images/ROW.jpg`` (``ROW-1.jpg`` and so on
for the others of a row), named for what their first bytes say. Paths stay paths, relative to the images folder. A data
set has one kind or the other, since ``data.root`` is one folder. Rows are written as conversations.py does.

``datasets`` is an extra and only reads: cells come as Arrow values, so nothing of it decodes a picture.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from grace_vlm.data.sources.conversations import Ids, PictureFolder, PreparedRows, Progress, RowsWriter
from grace_vlm.data.sources.prepare import check_place, staged_folder
from grace_vlm.errors import ConfigError, DataError

LICENCE = "that of the data set, as its own card states it."
_BATCH_ROWS = 32  # with their pictures in memory
_ID_BATCH_ROWS = 10_000
_ENDINGS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp", b"GIF8": "gif"}


def prepare_hf(
    out: Path,
    *,
    dataset: str,
    config: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    images: Path | None = None,
    skip_missing: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedRows:
    """Make one split of ``dataset`` into the folder ``out``.

    Args:
        dataset: an id on the Hub, a folder of ``save_to_disk``, a Parquet file, or a folder of data files.
        config: of a data set that has several.
        image_column: ``image`` or ``images``, whichever there is, if None.
        images: the folder that paths start from, for a data set that has paths.
        skip_missing: leave out rows whose pictures are missing.
        progress: called as ``progress(done, total, what)``.

    Raises:
        ConfigError: ``datasets`` is not installed; an ``out`` that must not be replaced; ``images`` where the data
            set has its pictures itself, or none where it has paths; a column that is not there.
        DataError: a data set that cannot be loaded or has no rows.
        PicturesMissing: pictures are missing, without ``skip_missing``. ``out`` is then as it was.
    """
    if skip_missing and images is None:
        raise ConfigError("--skip-missing is for pictures given by path; give their folder with --images")
    out, datasets = Path(out), _import()
    inputs = [Path(path) for path in (dataset, images) if path is not None and os.path.lexists(path)]
    check_place(out, overwrite, inputs)
    pictures = PictureFolder(Path(images)) if images is not None else None
    table = _load(datasets, dataset, config, split)
    columns = _Columns(dataset, table.column_names, image_column)
    tell = progress or (lambda done, total, what: None)
    ids = Ids()
    for cells in _cells(table, ["id"] if "id" in columns.kept else [], _ID_BATCH_ROWS):
        ids.reserve(cells["id"])
    with staged_folder(out) as folder, RowsWriter(folder, ids, pictures, skip_missing) as writer:
        store = _PictureStore(folder, dataset, images)
        for index, cells in enumerate(_cells(table, columns.kept, _BATCH_ROWS)):
            writer.add(index, columns.row(cells, store.replace(index, cells[columns.image])))
            tell(index, len(table), "writing rows")
        facts = {
            "dataset": dataset,
            "config": config,
            "split": split,
            "image_column": columns.image,
            "images": None if images is None else str(images),
            "images_sha256": store.digest.hexdigest() if store.has_pictures else None,
            "skip_missing": skip_missing,
        }
        rows_sha256 = writer.finish("hf", facts, LICENCE, dataset)
    return PreparedRows(out, "hf", images, rows_sha256, writer.report)


def _import() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "the source hf needs the package datasets, which is not installed; pip install datasets"
        ) from None
    return datasets


def _load(datasets: ModuleType, dataset: str, config: str | None, split: str) -> Any:
    """The split as a ``datasets.Dataset``."""
    expected = "an id on the Hub, a folder of save_to_disk, a Parquet file or a folder of data files is expected"
    path = Path(dataset)
    is_path = path.is_absolute() or dataset.startswith(".") or path.suffix == ".parquet"
    if is_path and not path.exists():
        raise DataError(f"{dataset} does not exist; {expected}")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(dataset)
            if isinstance(loaded, datasets.Dataset):
                loaded = {str(loaded.split or "train"): loaded}
            if split not in loaded:
                raise DataError(f"{dataset} has no split {split!r}; give --split, one of {', '.join(sorted(loaded))}")
            table = loaded[split]
        elif path.is_file():
            # A file has no splits: it is what the split's name stands for, "train[:100]" included.
            name = re.split(r"[\[+]", split)[0]
            table = datasets.load_dataset("parquet", data_files={name: dataset}, split=split)
        else:
            table = datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise DataError(f"{dataset} cannot be loaded: {reason}; {expected}") from error
    if not len(table):
        raise DataError(f"{dataset} has no rows in the split {split!r}; give another --split")
    return table


def _cells(table: Any, columns: list[str], batch_rows: int) -> Iterator[dict[str, Any]]:
    """Every row's cells as plain Python values; a picture is ``{"bytes", "path"}``."""
    if columns:
        for batch in table.select_columns(columns).with_format("arrow").iter(batch_size=batch_rows):
            yield from batch.to_pylist()


class _Columns:
    """Which columns of a data set become what of a row."""

    def __init__(self, dataset: str, names: list[str], image_column: str | None) -> None:
        there = f"its columns are {', '.join(names)}"
        if image_column is not None and image_column not in names:
            raise ConfigError(f"{dataset} has no column {image_column!r}; {there}")
        found = next((name for name in (image_column, "image", "images") if name in names), None)
        if found is None:
            raise ConfigError(f"{dataset} has no column image or images; {there}; name the right one: --image-column")
        if not {"conversations", "messages"} & set(names):
            raise ConfigError(f"{dataset} has no column conversations or messages; {there}")
        self.image: str = found
        known = ("id", "kind", "form", "conversations", "messages")
        self.kept = [self.image, *(name for name in known if name in names and name != self.image)]

    def row(self, cells: dict[str, Any], image: Any) -> dict[str, Any]:
        """A LLaVA row. A cell that is null is a key that is absent."""
        row = {name: cells[name] for name in self.kept if name != self.image and cells[name] is not None}
        if image is not None:
            row["image"] = image
        for name in ("conversations", "messages"):
            turns = row.get(name)
            if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
                # Older data sets store a list of turns by column: {"from": [...], "value": [...]}.
                row[name] = [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
        return row


class _PictureStore:
    """Writes the pictures that are in the data set, in the rows' order; lets paths pass."""

    def __init__(self, folder: Path, dataset: str, images: Path | None) -> None:
        self.digest = hashlib.sha256()
        self.has_pictures = False
        self._folder, self._dataset, self._images = folder / "images", dataset, images

    def replace(self, index: int, cell: Any) -> Any:
        """The cell of row ``index`` with a path in the place of every picture."""
        if isinstance(cell, list):
            return [self._replace_one(index, number, one) for number, one in enumerate(cell)]
        return self._replace_one(index, 0, cell)

    def _replace_one(self, index: int, number: int, cell: Any) -> Any:
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(data, bytes):
            return self._write(index, number, data)
        if not isinstance(path, str):
            return path
        if self._images is None:
            raise ConfigError(
                f"row {index} of {self._dataset} gives its picture by the path {path!r}; give the folder with --images"
            )
        # An Image column of a local data set holds absolute paths.
        full, root = os.path.abspath(path), os.path.abspath(self._images)
        is_below = os.path.isabs(path) and os.path.commonpath((full, root)) == root
        return os.path.relpath(full, root) if is_below else path

    def _write(self, index: int, number: int, data: bytes) -> str:
        if self._images is not None:
            raise ConfigError(f"row {index} of {self._dataset} holds its picture itself; leave out --images")
        self.has_pictures = True
        self._folder.mkdir(exist_ok=True)
        ending = next((name for magic, name in _ENDINGS.items() if data.startswith(magic)), "bin")
        name = f"{index:08d}{f'-{number}' if number else ''}.{ending}"
        (self._folder / name).write_bytes(data)
        self.digest.update(name.encode() + hashlib.sha256(data).digest())
        return f"images/{name}"
