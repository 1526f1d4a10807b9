"""VQAv2, TextVQA and VizWiz (validation): a short answer, compared with those of ten people.

``card`` is LLaVA-1.5's way: its prompts (TextVQA's gives the words that an OCR found) and EvalAI's scorer, here on the
validation splits, since the answers of the test splits are with the challenges' servers. Scores are shares, not right
or wrong: intervals are bootstrap, over pictures where rows name them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.evals.tasks.aggregate import clustered, questions, report
from grace_vlm.evals.tasks.choice import budget, the_picture
from grace_vlm.evals.tasks.columns import Cells, Column
from grace_vlm.evals.tasks.prompts import LMMS_SHORT_ENDING
from grace_vlm.evals.tasks.readers import find_files, local_source, read_table
from grace_vlm.evals.tasks.strict import cleaned
from grace_vlm.evals.tasks.task import (
    About,
    Doc,
    Docs,
    Extract,
    Metric,
    Part,
    Picture,
    Profile,
    Record,
    Report,
    checked_profile,
)
from grace_vlm.evals.tasks.vqa_answers import consensus, evalai_normal, kit_normal, vqav2_normal

_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@dataclass(frozen=True)
class ShortAnswers:
    """One of the three. ``picture``: the column that names the picture. ``category``: the column to break down by.
    ``lmms_normal``: how lmms-eval makes words alike for it."""

    about: About
    patterns: tuple[str, ...]
    picture: str | None
    category: str | None
    lmms_normal: Callable[[str], str]

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        files = find_files(folder, self.patterns, ("*.parquet",), about=self.about)
        docs: list[Doc] = []
        for file in files:
            for cells, pictures in read_table(file, self.about.columns, self.about.title):
                docs.append(self._doc(cells, the_picture(cells, pictures), len(docs)))
        return Docs(tuple(docs))

    def _doc(self, cells: Cells, picture: Picture, row: int) -> Doc:
        answers, doc_id = _answers(cells), cells.text("question_id")
        columns = {"picture": doc_id if self.picture is None else cells.text(self.picture)}
        if self.category is not None:
            columns[self.category] = cells.text(self.category)
        if self.about.name == "textvqa":
            columns["ocr"] = ", ".join(cells.texts("ocr_tokens"))
        question, most = cells.text("question"), max(answers, key=answers.count)
        return Doc(doc_id, row, "open", question, most, (picture,), answers=answers, columns=columns)

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        checked = checked_profile(self.about, profile)
        question, name = doc.question, self.about.name
        if checked == "lmms" and name != "vqav2":
            question = question.capitalize()
        if name == "textvqa" and checked == "card":
            question = f"{question}\nReference OCR token: {doc.columns['ocr']}"
        if name == "vizwiz" and checked != "kit":
            question = f"{question}\n{_UNANSWERABLE}"
        return (*doc.images, f"{question}\n{LMMS_SHORT_ENDING}")

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        # Where lmms-eval's task says nothing, its Qwen3-VL class says 128.
        lmms = 16 if self.about.name == "vqav2" else 128
        return budget(checked_profile(self.about, profile), lmms=lmms, card=128)

    def extract(self, raw: str, doc: Doc, profile: Profile) -> Extract:
        checked_profile(self.about, profile)
        said = raw.strip()
        return Extract.ok(said, "whole") if said else Extract.unparsed()

    def score(self, doc: Doc, extract: Extract, profile: Profile) -> float:
        checked = checked_profile(self.about, profile)
        if extract.value is None:
            return 0.0
        said = cleaned(extract.value) if checked == "strict" else extract.value
        normal = {"lmms": self.lmms_normal, "kit": kit_normal}.get(checked, evalai_normal)
        return consensus(normal(said), [normal(answer) for answer in doc.answers])

    def groups(self, doc: Doc) -> Mapping[str, str]:
        return {name: value for name, value in doc.columns.items() if name != "ocr"}

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked, metrics = checked_profile(self.about, profile), {"accuracy": _mean(records)}
        categories = () if self.category is None else (self.category,)
        return report(self.about.name, checked, records, metrics, "accuracy", _mean, categories)


def _mean(records: Sequence[Record]) -> Metric:
    return clustered([questions(records, "picture")])


def _answers(cells: Cells) -> tuple[str, ...]:
    """Texts, or VQAv2's objects with ``answer``."""
    value: Any = cells.values.get("answers")
    if isinstance(value, list) and value and all(isinstance(one, dict) and "answer" in one for one in value):
        value = [one["answer"] for one in value]
    answers = Cells(cells.file, cells.row, {"answers": value}).texts("answers")
    if not answers:
        raise cells.fault("answers", "the answers of ten people (test splits have none)")
    return answers


def _about(name: str, title: str, source: str, split: str, num_rows: int, *own: Column) -> About:
    columns = (Column("question_id"), Column("question"), Column("answers", "list"), Column("image", "picture"), *own)
    pattern = f"data/{split}-*.parquet"
    return About(name, title, "CC BY 4.0", source, "main", columns, {"questions": num_rows}, (pattern,))


VQAV2 = ShortAnswers(
    _about("vqav2", "VQAv2", "lmms-lab/VQAv2", "validation", 214_354, Column("image_id"), Column("answer_type")),
    ("validation-*.parquet",),
    "image_id",
    "answer_type",
    vqav2_normal,
)
TEXTVQA = ShortAnswers(
    _about(
        "textvqa", "TextVQA", "lmms-lab/textvqa", "validation", 5000, Column("image_id"), Column("ocr_tokens", "list")
    ),
    ("validation-*.parquet",),
    "image_id",
    None,
    evalai_normal,
)
VIZWIZ = ShortAnswers(
    _about("vizwiz", "VizWiz-VQA", "lmms-lab/VizWiz-VQA", "val", 4319, Column("category")),
    ("val-*.parquet",),
    None,
    "category",
    evalai_normal,
)
