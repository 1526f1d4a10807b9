"""MMBench (dev, English): every question is asked under each rotation of its options.

Row ``index`` k * 10^6 + i is rotation k of question i.

    circular     questions that are right under all of their rotations: the benchmark's own metric
    row mean     rows that are right; never below circular. The card's
    rotation 0   questions as they were written, without rotations

The file is the TSV of VLMEvalKit and OpenCompass, ``mmbench_dev_en_20231003.tsv``, or lmms-lab's Parquet, which writes
``L2-category``. A picture cell may hold the index of the row that has the picture. Intervals: Wilson for circular and
rotation 0, bootstrap over questions for the row mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.aggregate import clustered, flat, groups_right, questions, report
from grace_vlm.evals.tasks.choice import ReadByRule, budget, check_options, gold_letter, rules, the_picture
from grace_vlm.evals.tasks.columns import Cells, Column
from grace_vlm.evals.tasks.letters import lmms_mmbench_letter
from grace_vlm.evals.tasks.prompts import LMMS_ENDING, card_choice, dotted, kit_choice, pictures_first
from grace_vlm.evals.tasks.readers import find_files, local_source, read_table
from grace_vlm.evals.tasks.task import (
    About,
    Doc,
    Docs,
    Metric,
    Part,
    Picture,
    Profile,
    Record,
    Report,
    checked_profile,
)

_ROTATION = 1_000_000
_MAX_INDEX_CHARS = 64
_RULES = rules(lmms_mmbench_letter)


class MMBench(ReadByRule):
    rules = _RULES
    about = About(
        name="mmbench",
        title="MMBench",
        licence="Apache-2.0",
        source="lmms-lab/MMBench",
        revision="main",
        columns=(
            Column("index", "integer"),
            Column("question"),
            Column("hint", nullable=True),
            *(Column(letter, nullable=True) for letter in "ABCD"),
            Column("answer"),
            Column("category"),
            Column("l2-category", optional=True),
            Column("L2-category", optional=True),
            Column("source", optional=True),
            Column("split", optional=True),
            Column("image", "picture"),
        ),
        num_rows={"rows": 4329, "questions": 1164},
        patterns=("en/dev-*.parquet", "*.tsv"),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        choices = (("mmbench_dev_en_20231003.tsv",), ("*.tsv",), ("en/dev-*.parquet",), ("*.parquet",))
        files = find_files(folder, *choices, about=self.about)
        if len(files) > 1 and files[0].suffix == ".tsv":
            raise DataError(f"{folder} has {len(files)} .tsv files; expected one: give the file itself")
        docs: list[Doc] = []
        rows = _Pictures()
        for file in files:
            for cells, pictures in read_table(file, self.about.columns, self.about.title):
                docs.append(_doc(cells, rows.picture(cells, pictures), len(docs)))
        found = Docs(tuple(docs))
        _check_rotations(docs, files[0])
        return found

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        checked = checked_profile(self.about, profile)
        if checked == "kit":
            return pictures_first(doc, kit_choice(doc.question, doc.options, doc.hint))
        if checked == "lmms":
            # lmms-eval takes away the line breaks at the end of the last option.
            options = dotted(doc.options).rstrip("\n")
            asked = f"{doc.question} There are several options:\n{options}\n\n{LMMS_ENDING}"
            return pictures_first(doc, asked if doc.hint is None else f"{doc.hint} {asked}")
        return pictures_first(doc, card_choice(doc.question, doc.options, doc.hint))

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=1024)

    def groups(self, doc: Doc) -> Mapping[str, str]:
        index = int(doc.id)
        found = {"circular": str(index % _ROTATION), "rotation": str(index // _ROTATION)}
        return found | {name: doc.columns[name] for name in ("category", "l2-category") if name in doc.columns}

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        first = [record for record in records if record.groups["rotation"] == "0"]
        metrics = {"circular": _circular(records), "row mean": _row_mean(records), "rotation 0": flat(questions(first))}
        headline, measure = ("row mean", _row_mean) if checked == "card" else ("circular", _circular)
        return report(self.about.name, checked, records, metrics, headline, measure, ("category", "l2-category"))


def _circular(records: Sequence[Record]) -> Metric:
    return flat(groups_right(records, "circular"), "questions under all rotations")


def _row_mean(records: Sequence[Record]) -> Metric:
    return clustered([questions(records, "circular")], "rows")


def _doc(cells: Cells, picture: Picture, row: int) -> Doc:
    options = {letter: text for letter in "ABCD" if (text := cells.optional_text(letter)) is not None}
    check_options(cells, options)
    level_2 = cells.optional_text("l2-category") or cells.optional_text("L2-category")
    columns = {"category": cells.text("category")} | ({} if level_2 is None else {"l2-category": level_2})
    return Doc(
        id=str(cells.integer("index")),
        row=row,
        kind="choice",
        question=cells.text("question"),
        gold=gold_letter(cells, "answer", options),
        images=(picture,),
        options=options,
        hint=cells.optional_text("hint"),
        columns=columns,
    )


class _Pictures:
    """Pictures of rows, some of which only say whose picture they share."""

    def __init__(self) -> None:
        self._of_index: dict[str, Picture] = {}

    def picture(self, cells: Cells, pictures: Mapping[str, Picture]) -> Picture:
        value, picture = cells.values.get("image"), the_picture(cells, pictures)
        if isinstance(value, str) and len(value) <= _MAX_INDEX_CHARS and value.strip().isdigit():
            if value.strip() not in self._of_index:
                raise cells.fault("image", "a picture, or the index of an earlier row that has one")
            picture = self._of_index[value.strip()]
        self._of_index[str(cells.integer("index"))] = picture
        return picture


def _check_rotations(docs: Sequence[Doc], file: Path) -> None:
    """Every question's rotation 0 is there: circular would count another set of questions."""
    seen = {doc.id for doc in docs}
    lost = [doc.id for doc in docs if str(int(doc.id) % _ROTATION) not in seen]
    if lost:
        raise DataError(
            f"{file} has row {lost[0]} but not {int(lost[0]) % _ROTATION}, the question whose rotation it is; "
            "expected whole groups: fetch it again"
        )
