"""MMMU (validation): college questions of 30 subjects, with up to seven pictures each, 62 of them open in dev and val.

A question names its pictures, ``<image 3>`` for the column ``image_3``; so may an option, which may be nothing else.

    card     pictures that the *question* names come first, tags become the text ``<image>``; those of options are lost
    lmms     pictures of question and options, sorted by number, each in the place of a tag while there are tags
    kit      every tag is replaced by its picture
    strict   the card's words, every tag replaced by its picture, in options too

Open answers: see open_answers.py. kit turns an open question into "A = the gold answer, B = Other Answers" after the
model has answered. The score is the mean over all questions (micro), with that of each discipline and subject.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from grace_vlm.evals.tasks.aggregate import accuracy, report
from grace_vlm.evals.tasks.choice import KIT_NEW_TOKENS, budget, check_options, gold_letter, rules, same_letter
from grace_vlm.evals.tasks.columns import Cells, Column
from grace_vlm.evals.tasks.letters import kit_letter, mmmu_letter
from grace_vlm.evals.tasks.open_answers import card_open, gold_answers, mmmu_open
from grace_vlm.evals.tasks.prompts import LMMS_ENDING, LMMS_SHORT_ENDING, card_choice, dotted, kit_choice, lettered
from grace_vlm.evals.tasks.readers import find_files, local_source, read_table
from grace_vlm.evals.tasks.task import (
    About,
    Doc,
    Docs,
    Extract,
    Part,
    Picture,
    Profile,
    Record,
    Report,
    checked_profile,
)

DISCIPLINES: Mapping[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
_RULES = rules(mmmu_letter)
_TAG = re.compile(r"<image\s+(\d+)\s*>", re.IGNORECASE)
_LMMS_TAG = re.compile(r"<image (\d+)>")
_NUM_IMAGES = 7


class MMMU:
    about = About(
        name="mmmu",
        title="MMMU",
        licence="Apache-2.0",
        source="MMMU/MMMU",
        revision="main",
        columns=(
            Column("id"),
            Column("question"),
            Column("options", "list", nullable=True),
            Column("answer"),
            *(Column(f"image_{number}", "picture", nullable=True) for number in range(1, _NUM_IMAGES + 1)),
            Column("img_type", nullable=True),
            Column("topic_difficulty", nullable=True),
            Column("question_type"),
            Column("subfield", nullable=True),
            Column("explanation", nullable=True),
        ),
        num_rows={"validation": 900, "subjects": 30},
        patterns=("*/validation-*.parquet",),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        files = find_files(folder, ("*/validation-*.parquet",), ("validation-*.parquet",), about=self.about)
        docs: list[Doc] = []
        for file in files:
            for cells, pictures in read_table(file, self.about.columns, self.about.title):
                docs.append(_doc(cells, tuple(pictures.values()), len(docs)))
        return Docs(tuple(docs))

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        checked = checked_profile(self.about, profile)
        if checked == "card":
            return _card_prompt(doc)
        if checked == "lmms":
            return _lmms_prompt(doc)
        if checked == "kit":
            # Where no option is, VLMEvalKit's prompt ends after the question.
            text = kit_choice(doc.question, doc.options if doc.kind == "choice" else {})
            return placed(doc, text, keep_unnamed=_TAG.search(text) is None)
        return placed(doc, _card_text(doc))

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        checked = checked_profile(self.about, profile)
        return KIT_NEW_TOKENS if checked == "kit" else budget(checked, lmms=128, card=8 if doc.options else 32)

    def extract(self, raw: str, doc: Doc, profile: Profile) -> Extract:
        checked = checked_profile(self.about, profile)
        if doc.kind == "choice":
            return _RULES[checked](raw, doc.options)
        if checked == "kit":
            return kit_letter(raw, {"A": doc.gold, "B": "Other Answers"})
        said = raw.strip()
        rule = "whole" if checked == "card" else "candidates"
        return Extract.ok(said, rule) if said else Extract.unparsed()

    def score(self, doc: Doc, extract: Extract, profile: Profile) -> float:
        checked = checked_profile(self.about, profile)
        if extract.value is None:
            return 0.0
        if doc.kind == "choice":
            return same_letter(doc, extract)
        if checked == "kit":
            return float(extract.value == "A")
        if checked == "card":
            return float(card_open(extract.value, doc.gold.strip()))
        if checked == "lmms":
            return float(mmmu_open(extract.value, (doc.gold,)))
        return float(mmmu_open(html.unescape(extract.value), gold_answers(doc.gold)))

    def groups(self, doc: Doc) -> Mapping[str, str]:
        return {"question_type": doc.kind, **doc.columns}

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        metrics = {"accuracy": accuracy(records)}
        categories = ("discipline", "subject", "question_type")
        return report(self.about.name, checked, records, metrics, "accuracy", accuracy, categories)


def placed(doc: Doc, text: str, keep_unnamed: bool = True) -> tuple[Part, ...]:
    """The text with every tag replaced by its picture; pictures that no tag names come first, or are left out."""
    parts: list[Part] = []
    named: set[str] = set()
    pieces = _TAG.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            picture = _picture(doc, piece)
            named.add(picture.column)
            parts.append(picture)
        elif piece:
            parts.append(piece)
    unnamed = [picture for picture in doc.images if picture.column not in named] if keep_unnamed else []
    return (*unnamed, *parts)


def _card_text(doc: Doc) -> str:
    if doc.kind == "choice":
        return card_choice(doc.question, doc.options)
    return f"{doc.question.strip()}\nAnswer with a short phrase or number only."


def _card_prompt(doc: Doc) -> tuple[Part, ...]:
    """The script replaces tags in the question alone: an option's ``<image 2>`` stays as it is, without its picture."""
    there = {picture.column: picture for picture in doc.images}
    names = dict.fromkeys(f"image_{int(number)}" for number in _TAG.findall(doc.question))
    images = [there[name] for name in names if name in there]
    if not images and "image_1" in there:
        images = [there["image_1"]]
    question = _TAG.sub("<image>", doc.question).strip()
    if doc.kind == "choice":
        return (*images, card_choice(question, doc.options))
    return (*images, f"{question}\nAnswer with a short phrase or number only.")


def _lmms_prompt(doc: Doc) -> tuple[Part, ...]:
    """``mmmu_doc_to_messages``: text between tags goes to the pictures in turn. With more tags than pictures (one
    picture named twice) the stretches between are lost, as there."""
    if doc.kind == "choice":
        text = f"{doc.question}\n{dotted(doc.options)}\n\n{LMMS_ENDING}"
    else:
        text = f"{doc.question}\n\n{LMMS_SHORT_ENDING}"
    names = sorted(set(_LMMS_TAG.findall(text)))
    stretches = [stretch.strip() for stretch in re.sub(r"<image [1-7]>", "<image>", text).split("<image>")]
    parts: list[Part] = []
    for position, number in enumerate(names):
        if position < len(stretches) - 1 and stretches[position]:
            parts.append(stretches[position])
        parts.append(_picture(doc, number))
    return (*parts, stretches[-1])


def _picture(doc: Doc, number: str) -> Picture:
    """Of a tag that ``docs`` has checked."""
    return next(picture for picture in doc.images if picture.column == f"image_{int(number)}")


def _doc(cells: Cells, images: tuple[Picture, ...], row: int) -> Doc:
    given = cells.text("question_type")
    if given not in ("multiple-choice", "open"):
        raise cells.fault("question_type", "multiple-choice or open")
    is_choice = given == "multiple-choice"
    options = lettered(cells.texts("options")) if is_choice else {}
    if is_choice:
        check_options(cells, options)
    there = {picture.column for picture in images}
    for number in _TAG.findall("\n".join((cells.text("question"), *options.values()))):
        if f"image_{int(number)}" not in there:
            raise cells.fault(f"image_{int(number)}", f"the picture that the question names as <image {number}>")
    doc_id, subject = cells.text("id"), cells.file.parent.name
    match = re.fullmatch(r"[a-z]+_(.+)_\d+", doc_id)
    subject = match.group(1) if match else subject
    return Doc(
        id=doc_id,
        row=row,
        kind="choice" if is_choice else "open",
        question=cells.text("question"),
        gold=gold_letter(cells, "answer", options) if is_choice else _open_gold(cells),
        images=images,
        options=options,
        columns={"subject": subject, "discipline": _DISCIPLINE_OF.get(subject, "other")},
    )


def _open_gold(cells: Cells) -> str:
    """The answer as its column has it; a list of answers as the text of one."""
    value = cells.values.get("answer")
    return str(value) if isinstance(value, list) and value else cells.text("answer")
