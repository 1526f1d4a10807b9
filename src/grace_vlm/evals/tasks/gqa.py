"""GQA (testdev balanced): 12,578 short answers, made from scene graphs of 398 pictures, each with one gold answer.

Questions and pictures are in two Parquet tables, joined by ``imageId``. The reply as a whole is compared: lower-cased
without a closing full stop (``card``: LLaVA-1.5 with the official script), without any punctuation (``lmms``), stripped
(``kit``), or with words made alike as for VQA (``strict``). Intervals: bootstrap over pictures.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.aggregate import clustered, questions, report
from grace_vlm.evals.tasks.choice import budget, the_picture
from grace_vlm.evals.tasks.columns import Column
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
from grace_vlm.evals.tasks.vqa_answers import evalai_normal

_INSTRUCTIONS, _IMAGES = "testdev_balanced_instructions", "testdev_balanced_images"
_IMAGE_COLUMNS = (Column("id"), Column("image", "picture"))


class GQA:
    about = About(
        name="gqa",
        title="GQA",
        licence="CC BY 4.0",
        source="lmms-lab/GQA",
        revision="main",
        columns=(Column("id"), Column("imageId"), Column("question"), Column("answer")),
        num_rows={"questions": 12_578, "pictures": 398},
        patterns=(f"{_INSTRUCTIONS}/*.parquet", f"{_IMAGES}/*.parquet"),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        if not folder.is_dir():
            raise DataError(f"{folder} is a file; the folder with {_INSTRUCTIONS} and {_IMAGES} is expected")
        images: dict[str, Picture] = {}
        for file in find_files(folder, (f"{_IMAGES}/*.parquet",), about=self.about):
            for cells, pictures in read_table(file, _IMAGE_COLUMNS, self.about.title):
                images[cells.text("id")] = the_picture(cells, pictures)
        docs: list[Doc] = []
        for file in find_files(folder, (f"{_INSTRUCTIONS}/*.parquet",), about=self.about):
            for cells, _ in read_table(file, self.about.columns, self.about.title):
                name = cells.text("imageId")
                if name not in images:
                    raise cells.fault("imageId", f"the id of a picture in {_IMAGES}")
                doc_id, question, gold = cells.text("id"), cells.text("question"), cells.text("answer")
                columns = {"picture": name}
                docs.append(Doc(doc_id, len(docs), "open", question, gold, (images[name],), columns=columns))
        return Docs(tuple(docs))

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        checked_profile(self.about, profile)
        return (*doc.images, f"{doc.question}\n{LMMS_SHORT_ENDING}")

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=16, card=128)

    def extract(self, raw: str, doc: Doc, profile: Profile) -> Extract:
        said = compared(raw, checked_profile(self.about, profile))
        return Extract.ok(said, "whole") if said else Extract.unparsed()

    def score(self, doc: Doc, extract: Extract, profile: Profile) -> float:
        checked = checked_profile(self.about, profile)
        gold = doc.gold if checked == "card" else compared(doc.gold, checked)
        return float(extract.value is not None and extract.value == gold)

    def groups(self, doc: Doc) -> Mapping[str, str]:
        return doc.columns

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        metrics = {"accuracy": _accuracy(records)}
        return report(self.about.name, checked, records, metrics, "accuracy", _accuracy, ())


def compared(text: str, profile: Profile) -> str:
    """The form in which a profile compares a reply with the gold answer."""
    if profile == "card":
        return text.strip().rstrip(".").lower()
    if profile == "lmms":
        return text.strip().lower().translate(str.maketrans("", "", string.punctuation))
    return text.strip().lower() if profile == "kit" else evalai_normal(cleaned(text))


def _accuracy(records: Sequence[Record]) -> Metric:
    return clustered([questions(records, "picture")])
