"""From row numbers to encoded rows with their pictures, or to lines of the ledger.

The work is in two halves. ``prepare`` reads, decodes, patchifies and encodes; it changes nothing that decides a run,
so worker processes may do it ahead of time. ``admit`` writes faults to the ledger and charges the budget; it happens
in the training process when a row's turn comes, so that the ledger is the same for any number of workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from grace_vlm.data.encode import Encoder, Sample
from grace_vlm.data.ledger import BadRowBudget, Ledger
from grace_vlm.data.pictures import Picture, PictureStore
from grace_vlm.data.rows import Fault, Row, RowFile
from grace_vlm.media.image import LoadedImage

Entry = tuple[Row, Sample, list[Picture]]
"""A good row, encoded, with its pictures."""


class Preparer:
    """Row number -> entry or fault, with what may be kept of earlier work.

    Args:
        max_tokens: longer rows are faults. A row is never cut: a cut could go through a picture or lose an answer.
        samples_kept: how many encoded rows to keep.
        keeps_features: whether the models keep the tower's output for a picture, which then needs no pixels.
    """

    def __init__(
        self,
        rows: RowFile,
        encoder: Encoder,
        pictures: PictureStore,
        max_tokens: int,
        samples_kept: int = 0,
        keeps_features: Callable[[str], bool] | None = None,
    ) -> None:
        self.rows, self.encoder, self.pictures = rows, encoder, pictures
        self.max_tokens, self.samples_kept, self.keeps_features = max_tokens, samples_kept, keeps_features
        self._samples: dict[int, tuple[Row, Sample]] = {}

    def prepare(self, indices: Sequence[int], *, as_prompt: bool = False) -> list[Entry | Fault]:
        """One result a row, in order; their new pictures are patchified together."""
        rows = [self._samples[i][0] if i in self._samples else self.rows.row(i) for i in indices]
        pictures = self.pictures_of([row for row in rows if isinstance(row, Row)])
        return [row if isinstance(row, Fault) else self._entry(row, pictures, as_prompt) for row in rows]

    def _entry(self, row: Row, pictures: Mapping[str, Picture | Fault], as_prompt: bool) -> Entry | Fault:
        own: list[Picture] = []
        for name in row.images:
            picture = pictures[name]
            if isinstance(picture, Fault):
                return dataclasses.replace(picture, row=row.index, id=row.id)
            own.append(picture)
        if row.index in self._samples and not as_prompt:
            return row, self._samples[row.index][1], own
        encode = self.encoder.prompt if as_prompt else self.encoder.encode
        sample = encode(row, [picture.grid for picture in own])
        if sample.num_tokens > self.max_tokens:
            reason = f"{sample.num_tokens} tokens; the limit is {self.max_tokens} (data.max_tokens)"
            return Fault(row.index, row.id, "too_many_tokens", reason)
        if len(self._samples) < self.samples_kept and not as_prompt:
            self._samples[row.index] = (row, sample)
        return row, sample, own

    def pictures_of(self, rows: Sequence[Row]) -> dict[str, Picture | Fault]:
        """By name, the pictures of rows; with pixels, unless the tower's output for them is kept."""
        found: dict[str, Picture | Fault] = {}
        decoded: dict[str, LoadedImage] = {}
        for row in rows:
            for name in row.images:
                if name in found or name in decoded:
                    continue
                is_kept = self.keeps_features is not None and self.keeps_features(name)
                loaded = self.pictures.find(name, with_pixels=not is_kept) or self.rows.load_image(row, name)
                if isinstance(loaded, LoadedImage):
                    decoded[name] = loaded
                else:
                    found[name] = loaded
        for start in range(0, len(decoded), 64):
            chunk = list(decoded.items())[start : start + 64]
            found.update((picture.key, picture) for picture in self.pictures.add_many(chunk))
        return found


class RowReader:
    """A preparer with its ledger (None: an evaluation, whose budget is 0)."""

    def __init__(self, preparer: Preparer, ledger: Ledger | None, max_bad_fraction: float) -> None:
        self.preparer, self.ledger = preparer, ledger
        self.budget = BadRowBudget(max_bad_fraction, len(preparer.rows), ledger.faults if ledger else ())

    def admit(self, found: Entry | Fault) -> Entry | None:
        """A good row as it is; a bad one is then in the ledger, and over budget a ``DataError``."""
        if not isinstance(found, Fault):
            return found
        if self.ledger is None or self.ledger.add(found):
            self.budget.charge(found)
        return None

    def read_many(self, indices: Sequence[int], *, as_prompt: bool = False) -> list[Entry]:
        """The good rows among ``indices``, in order."""
        found = self.preparer.prepare(indices, as_prompt=as_prompt)
        return [entry for entry in map(self.admit, found) if entry is not None]
