"""ScienceQA (test): school questions, half of them without a picture. 2 to 5 options; letters go to J.

    overall   all 4,241 questions: the scripts of GRACE print it first
    image     the 2,017 with a picture: LLaVA's "SQA-I", lmms-eval's ``scienceqa_img``, VLMEvalKit's ``ScienceQA_TEST``

The files are ``problems.json``, ``pid_splits.json`` and ``images/<split>/<pid>/image.png``, or lmms-lab's Parquet. A
picture that ``problems.json`` names and that is not there is an error; GRACE's script then asks without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.aggregate import accuracy, report
from grace_vlm.evals.tasks.choice import ReadByRule, budget, check_options, gold_index, rules
from grace_vlm.evals.tasks.columns import Cells, Column, check_names
from grace_vlm.evals.tasks.letters import lmms_scienceqa_letter
from grace_vlm.evals.tasks.prompts import LMMS_ENDING, card_choice, dotted, kit_choice, lettered, pictures_first
from grace_vlm.evals.tasks.readers import find_files, local_source, picture_file, read_json, read_table
from grace_vlm.evals.tasks.task import (
    About,
    Doc,
    Docs,
    Part,
    Picture,
    Profile,
    Record,
    Report,
    checked_profile,
)

_RULES = rules(lmms_scienceqa_letter)
_CATEGORIES = ("subject", "topic", "grade")
_SPLIT = "test"


class ScienceQA(ReadByRule):
    rules = _RULES
    about = About(
        name="scienceqa",
        title="ScienceQA",
        licence="CC BY-NC-SA 4.0",
        source="lmms-lab/ScienceQA",
        revision="main",
        columns=(
            Column("question"),
            Column("choices", "list"),
            Column("answer", "integer"),
            Column("hint", nullable=True),
            Column("image", "picture", nullable=True),
            *(Column(name, nullable=True) for name in (*_CATEGORIES, "category", "lecture", "solution")),
        ),
        num_rows={"overall": 4241, "image": 2017},
        patterns=("ScienceQA-FULL/test-*.parquet",),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        tables = (("ScienceQA-FULL/test-*.parquet",), ("test-*.parquet",), ("*.parquet",))
        files = find_files(folder, ("problems.json",), *tables, about=self.about)
        docs: list[Doc] = []
        if files[0].name == "problems.json":
            for pid, cells, pictures in self._problems(files[0]):
                docs.append(_doc(pid, cells, pictures, len(docs)))
            return Docs(tuple(docs))
        for file in files:
            for cells, found in read_table(file, self.about.columns, self.about.title):
                docs.append(_doc(str(len(docs)), cells, tuple(found.values()), len(docs)))
        return Docs(tuple(docs))

    def _problems(self, file: Path) -> Iterator[tuple[str, Cells, tuple[Picture, ...]]]:
        """Rows of the test split, in the order of ``pid_splits.json``."""
        problems, splits = read_json(file), read_json(file.with_name("pid_splits.json"))
        if not isinstance(problems, dict) or not all(isinstance(one, dict) for one in problems.values()):
            raise DataError(f"{file} is no JSON object of problems by their id; fetch it again")
        pids = splits.get(_SPLIT) if isinstance(splits, dict) else None
        if not isinstance(pids, list):
            raise DataError(f"{file.with_name('pid_splits.json')} has no list {_SPLIT!r}; fetch it again")
        for row, pid in enumerate(map(str, pids)):
            if pid not in problems:
                raise DataError(f"{file} has no problem {pid}, which pid_splits.json names; fetch it again")
            cells = Cells(file, row, problems[pid])
            check_names(self.about.columns, cells.values, file, self.about.title)
            name, root = cells.optional_text("image"), file.parent / "images" / _SPLIT / pid
            yield pid, cells, () if name is None else (picture_file(root, name, cells, "image"),)

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        checked = checked_profile(self.about, profile)
        if checked == "kit":
            return pictures_first(doc, kit_choice(doc.question, doc.options, doc.hint))
        if checked == "lmms":
            asked = f"{doc.question}\n{dotted(doc.options)}\n{LMMS_ENDING}"
            return pictures_first(doc, asked if doc.hint is None else f"Context: {doc.hint}\n{asked}")
        return pictures_first(doc, card_choice(doc.question, doc.options, doc.hint))

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=16)

    def groups(self, doc: Doc) -> Mapping[str, str]:
        return {"population": "image" if doc.images else "text", **doc.columns}

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        with_image = [record for record in records if record.groups["population"] == "image"]
        metrics = {"overall": accuracy(records), "image": accuracy(with_image)}
        headline = "image" if checked in ("lmms", "kit") else "overall"
        categories = ("population", *_CATEGORIES)
        return report(self.about.name, checked, records, metrics, headline, accuracy, categories)


def _doc(doc_id: str, cells: Cells, images: tuple[Picture, ...], row: int) -> Doc:
    options = lettered(cells.texts("choices"))
    check_options(cells, options)
    gold, question = gold_index(cells, "answer", options), cells.text("question")
    columns = {name: value for name in _CATEGORIES if (value := cells.optional_text(name)) is not None}
    return Doc(doc_id, row, "choice", question, gold, images, options, cells.optional_text("hint"), columns=columns)
