"""SEED-Bench, the picture part: about 14,230 questions of nine types. Rows about videos are skipped, and counted.

The files are ``SEED-Bench.json`` and the folder ``SEED-Bench-image``, or lmms-lab's Parquet. Intervals: bootstrap over
pictures, since several questions are about one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.aggregate import clustered, questions, report
from grace_vlm.evals.tasks.choice import ReadByRule, budget, check_options, gold_letter, rules
from grace_vlm.evals.tasks.columns import Cells, Column, check_names, inside
from grace_vlm.evals.tasks.letters import lmms_seed_letter
from grace_vlm.evals.tasks.prompts import usual_choice
from grace_vlm.evals.tasks.readers import find_files, local_source, picture_file, read_json
from grace_vlm.evals.tasks.task import (
    About,
    Doc,
    Docs,
    Metric,
    Part,
    Profile,
    Record,
    Report,
    checked_profile,
)

_RULES = rules(lmms_seed_letter)
_ENDINGS = ("", ".jpg", ".png", ".jpeg")


class SEEDBench(ReadByRule):
    rules = _RULES
    about = About(
        name="seed",
        title="SEED-Bench",
        licence="CC BY-NC 4.0",
        source="AILab-CVC/SEED-Bench",
        revision="main",
        columns=(
            Column("question_id"),
            Column("question"),
            *(Column(f"choice_{letter}", nullable=True) for letter in "abcd"),
            Column("answer"),
            Column("data_id"),
            Column("data_type"),
            Column("question_type_id", "integer"),
        ),
        num_rows={"image": 14_233},
        patterns=("SEED-Bench.json", "SEED-Bench-image.zip"),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        file = find_files(folder, ("SEED-Bench.json",), about=self.about)[0]
        rows, types = _content(file)
        images = file.parent / "SEED-Bench-image"
        if not images.is_dir():
            raise DataError(f"{images} is no folder; unpack SEED-Bench-image.zip beside {file.name}")
        docs: list[Doc] = []
        skipped = 0
        for cells in self._rows(file, rows):
            if cells.text("data_type").strip().lower() != "image":
                skipped += 1
                continue
            docs.append(_doc(cells, images, types, len(docs)))
        return Docs(tuple(docs), {"video": skipped} if skipped else {})

    def _rows(self, file: Path, rows: Sequence[Any]) -> Iterator[Cells]:
        for number, values in enumerate(rows):
            if not isinstance(values, dict):
                raise DataError(f"row {number} of {file} is no JSON object; fetch it again")
            check_names(self.about.columns, values, file, self.about.title)
            yield Cells(file, number, values)

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        return usual_choice(doc, checked_profile(self.about, profile))

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=128)

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        metrics = {"accuracy": _accuracy(records)}
        return report(self.about.name, checked, records, metrics, "accuracy", _accuracy, ("question_type",))


def _accuracy(records: Sequence[Record]) -> Metric:
    return clustered([questions(records, "picture")])


def _content(file: Path) -> tuple[list[Any], dict[str, str]]:
    """The questions, and the names of their types by id."""
    content = read_json(file)
    rows = content.get("questions") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f"{file} has no list of questions; fetch it again")
    names = content.get("question_type", {}) if isinstance(content, dict) else {}
    return rows, {str(number): str(name) for name, number in names.items()}


def _doc(cells: Cells, images: Path, types: Mapping[str, str], row: int) -> Doc:
    texts = {letter: cells.optional_text(f"choice_{letter.lower()}") for letter in "ABCD"}
    options = {letter: text for letter, text in texts.items() if text is not None}
    check_options(cells, options)
    data_id, type_id = cells.text("data_id"), str(cells.integer("question_type_id"))
    name = next((data_id + end for end in _ENDINGS if _is_file(images, data_id + end)), data_id)
    return Doc(
        id=cells.text("question_id"),
        row=row,
        kind="choice",
        question=cells.text("question"),
        gold=gold_letter(cells, "answer", options),
        images=(picture_file(images, name, cells, "data_id"),),
        options=options,
        columns={"picture": data_id, "question_type": types.get(type_id, type_id)},
    )


def _is_file(root: Path, name: str) -> bool:
    path = inside(root, name)
    return path is not None and path.is_file()
