"""Make a cache of the teacher: one pass over the rows of a recipe, each row once, whatever the method is.

Everything that a run may want is computed (gate and relations too), so one cache serves kd, grace and their ablations.
Rows are read and checked as in training, bad ones go to the cache's own ledger. The teacher sees rows in the recipe's
layout, packed or padded, up to ``runtime.frozen_batch_tokens`` at a time, beside others of their length.

A row whose entry is there already is not computed again, so a build that was interrupted goes on, and rows that were
added to the file are added to the cache. Rows are still read and their pictures decoded: only their content says
whether they are the ones that were seen.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from grace_vlm.checkpoint.atomic import publish_folder, sweep_partials
from grace_vlm.checkpoint.lock import FolderLock
from grace_vlm.checkpoint.manifest import verify_manifest
from grace_vlm.data.collate import Batch, collate
from grace_vlm.data.ledger import Ledger
from grace_vlm.data.reader import Entry as Row
from grace_vlm.data.reader import RowReader
from grace_vlm.data.workers import Chunk, prepared
from grace_vlm.errors import CheckpointError, ConfigError, GraceError, NonFiniteError
from grace_vlm.losses.rcka import centred_grams
from grace_vlm.losses.signal import triangle
from grace_vlm.models.fp8 import quantize_rows
from grace_vlm.models.load import LoadedModel, use_device
from grace_vlm.train.cache_identity import (
    FILE,
    CacheInfo,
    Hidden,
    made_of,
    read_info,
    require_same_cache,
    write_info,
)
from grace_vlm.train.cache_shards import Entry, EntryStore, ShardWriter, list_shards, remedy
from grace_vlm.train.config import Recipe
from grace_vlm.train.open import (
    check_relational_layer,
    open_preparer,
    open_rows,
    open_teacher,
    open_without_weights,
    started_from,
)
from grace_vlm.train.teacher import OnlineTeacher

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""
READ_ROWS = 8
"""Rows that are prepared together."""
WINDOW_ROWS = 64
"""Rows that wait, decoded, to be put together with others of their length."""


@dataclass(frozen=True)
class BuildReport:
    """What a build left. ``num_new``: entries that it made; the others were there. ``num_tokens``: supervised ones."""

    num_rows: int
    num_bad: int
    num_entries: int
    num_new: int
    num_tokens: int
    num_bytes: int


def recipe_of_cache(recipe: Recipe) -> Recipe:
    """The recipe whose teacher says everything: grace with its gate and relations, no cache, a student that is there.

    Raises:
        ConfigError: the recipe names no teacher.
    """
    if recipe.model.teacher is None:
        raise ConfigError("a cache needs a teacher to make it of; set model.teacher to a model folder")
    loss = recipe.loss.model_copy(update={"gate": True, "relational": True})
    model = recipe.model.model_copy(update={"teacher_cache": None})
    return started_from(recipe.model_copy(update={"method": "grace", "loss": loss, "model": model}))


def build_cache(
    recipe: Recipe,
    out: Path,
    hidden: Hidden = "exact",
    notify: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> BuildReport:
    """Make the cache of a recipe in ``out``, or go on with it.

    Raises:
        ConfigError: no teacher, or ``out`` is the cache of something else.
        CheckpointError: ``out`` is another folder, or its disk refuses. DataError: too many bad rows.
        NonFiniteError: the teacher says NaN or Inf of a row; it is named, and nothing of it is kept.
    """
    recipe = recipe_of_cache(recipe)
    is_new = not out.exists()
    if not is_new and not (out.is_dir() and ((out / FILE).is_file() or not any(_strangers(out)))):
        raise CheckpointError(f"{out} exists and is no cache of a teacher (no {FILE}); choose another --out")
    with FolderLock(out):
        for stale in (*sweep_partials(out), *sweep_partials(out / "shards")):
            notify(f"removed {stale.name}, left by an interrupted write")
        try:
            use_device(recipe.teacher_device)
            student = open_without_weights(recipe, open_rows(recipe))
            teacher = _open_teacher(recipe, student)
            _publish_info(recipe, out, hidden, student, teacher)
        except GraceError:
            # What cannot start leaves nothing behind.
            if is_new:
                shutil.rmtree(out)
            raise
        return _Build(recipe, out, hidden, student, teacher).run(progress)


def _strangers(out: Path) -> Iterator[Path]:
    """What is in a folder that a build killed at its very start did not leave there."""
    return (path for path in out.iterdir() if path.name != "head" and not path.name.startswith("."))


def _open_teacher(recipe: Recipe, student: LoadedModel) -> OnlineTeacher:
    loaded = open_teacher(recipe, student)
    assert loaded is not None
    check_relational_layer(recipe, loaded.model)
    teacher = OnlineTeacher(loaded, recipe.objective(), recipe.loss.relational_layer, 0)
    if recipe.runtime.compile and teacher.device.type == "cuda":
        teacher.compile_layers()
    return teacher


def _publish_info(recipe: Recipe, out: Path, hidden: Hidden, student: LoadedModel, teacher: OnlineTeacher) -> None:
    """The head, then ``cache.json``: who finds the second has the first. A cache that is there must be of the same."""
    head = teacher.head.detach().cpu().contiguous()
    info = CacheInfo(hidden, (head.shape[0], head.shape[1]), made_of(recipe, student, teacher.dtype))
    if (out / FILE).is_file():
        require_same_cache(out, read_info(out), info)
        return
    with publish_folder(out / "head", overwrite=True, needed_bytes=head.nbytes) as stage:
        save_file({"head": head}, stage / "head.safetensors")
    write_info(out, info)


class _Build:
    """One pass."""

    def __init__(self, recipe: Recipe, out: Path, hidden: Hidden, student: LoadedModel, teacher: OnlineTeacher) -> None:
        self.recipe, self.out, self.hidden, self.student, self.teacher = recipe, out, hidden, student, teacher
        self.rows = open_rows(recipe)
        preparer = open_preparer(recipe, student, self.rows, dtype=teacher.dtype, with_digests=True)
        self.reader = RowReader(preparer, Ledger(out / "ledger.jsonl"), recipe.data.max_bad_fraction)
        self.known = EntryStore(out)
        self.new: set[bytes] = set()
        self.num_tokens = 0

    def run(self, progress: Progress) -> BuildReport:
        """Publish an entry for every row that has none."""
        with ShardWriter(self.out) as writer:
            missing = self._missing(progress)
            while window := list(itertools.islice(missing, WINDOW_ROWS)):
                window.sort(key=lambda row: row.num_tokens)
                for key, entry in self._entries(window):
                    writer.add(key, entry)
                    self.num_tokens += len(entry.gate)
        return BuildReport(
            len(self.rows),
            self.reader.budget.num_bad,
            len(self.known) + len(self.new),
            len(self.new),
            self.known.num_tokens + self.num_tokens,
            _num_bytes(self.out),
        )

    def _missing(self, progress: Progress) -> Iterator[Batch]:
        """Every good row that has no entry yet, once, as a batch of its own."""
        total = len(self.rows)
        chunks: Iterator[Chunk] = (
            [((0, index + 1), index) for index in range(first, min(first + READ_ROWS, total))]
            for first in range(0, total, READ_ROWS)
        )
        for (_, done), result in prepared(self.reader.preparer, chunks, self.recipe.data.workers):
            row = self.reader.admit(result)
            if row is not None:
                batch = self._collated(row)
                key = batch.shares[0].key
                if key is not None and key not in self.known and key not in self.new:
                    self.new.add(key)
                    yield batch
            progress(done, total)

    def _collated(self, row: Row) -> Batch:
        _, sample, pictures = row
        adapter, config = self.student.adapter, self.student.model.config
        lengths = [adapter.num_visual_tokens(config, picture.grid) for picture in pictures]
        pad = self.student.processor.tokenizer.pad_token_id
        return collate([sample], pictures, lengths, pad, "packed" if self.recipe.data.packing else "right")

    def _entries(self, rows: list[Batch]) -> Iterator[tuple[bytes, Entry]]:
        """What the teacher says about some rows: computed together, copied to the host at once, cut row by row."""
        signals = self.teacher.signals(rows, self.recipe.runtime.frozen_batch_tokens)
        lengths = [row.image_lengths for row in rows]
        seen = torch.cat([signal.relational for signal in signals if isinstance(signal.relational, torch.Tensor)])
        grams = centred_grams(seen, list(itertools.chain.from_iterable(lengths))).values.cpu()
        states = torch.cat([signal.hidden for signal in signals])
        gate = torch.cat([signal.gate for signal in signals]).cpu()
        num_tokens = [row.shares[0].num_supervised for row in rows]
        _require_finite(rows, states, gate, grams, num_tokens)
        hidden, scale = self._stored(states)
        scales = [None] * len(rows) if scale is None else scale.split(num_tokens)
        parts = zip(
            rows,
            hidden.split(num_tokens),
            scales,
            gate.split(num_tokens),
            grams.split([sum(map(triangle, own)) for own in lengths]),
            strict=True,
        )
        for row, own_hidden, own_scale, own_gate, own_grams in parts:
            key = row.shares[0].key
            assert key is not None
            yield key, Entry(own_hidden, own_scale, own_gate, own_grams, row.image_lengths)

    def _stored(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """((n, d) as it is kept, (n,) scales of FP8), on the host."""
        if self.hidden == "fp8":
            codes, scale = quantize_rows(hidden)
            return codes.cpu(), scale.flatten().cpu()
        return (hidden.bfloat16() if self.hidden == "bf16" else hidden).cpu(), None


def _require_finite(
    rows: list[Batch], hidden: torch.Tensor, gate: torch.Tensor, grams: torch.Tensor, num_tokens: list[int]
) -> None:
    """``NonFiniteError`` naming the first row of which a number is not finite: such an entry would stop every run."""
    if bool(hidden.isfinite().all()) and bool(gate.isfinite().all()) and bool(grams.isfinite().all()):
        return
    values = grams.split([sum(map(triangle, row.image_lengths)) for row in rows])
    for row, own in zip(rows, zip(hidden.split(num_tokens), gate.split(num_tokens), values, strict=True), strict=True):
        if not all(bool(part.isfinite().all()) for part in own):
            raise NonFiniteError(
                f"what the teacher says about row {row.sample_ids[0]!r} is not finite; repair the row or leave it out, "
                "then run the same command again"
            )


def verify_cache(root: Path, progress: Progress = lambda done, total: None) -> BuildReport:
    """Hash every byte of a cache again.

    Raises:
        CheckpointError: no cache, or the first shard that is not what was written.
    """
    read_info(root)
    verify_manifest(root / "head")
    folders = list_shards(root)
    for number, folder in enumerate(folders):
        try:
            verify_manifest(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{str(error).split('; ')[0]}; {remedy(folder)}") from error
        progress(number + 1, len(folders))
    store = EntryStore(root)
    return BuildReport(len(store), 0, len(store), 0, store.num_tokens, _num_bytes(root))


def _num_bytes(root: Path) -> int:
    """Of everything in a cache but its lock."""
    return sum(path.stat().st_size for path in root.rglob("[!.]*") if path.is_file())
