"""MMStar: 1,500 questions that cannot be answered without the picture, 250 in each of 6 categories, 18 sub-categories.

    mean    over the questions: VLMEvalKit's, Qwen's and the card's
    macro   mean over the sub-categories: lmms-eval's

The TSV of VLMEvalKit has the options in the columns A to D; the Parquet (``Lin-Chen/MMStar``) has them in the
question's text alone. The TSV is taken where a folder has both. Where options have no columns, A to D are the letters,
and rules that look for an option's text find none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.aggregate import accuracy, macro, report
from grace_vlm.evals.tasks.choice import ReadByRule, budget, check_options, gold_letter, rules, the_picture
from grace_vlm.evals.tasks.columns import Cells, Column
from grace_vlm.evals.tasks.letters import card_last_letter, lmms_letter
from grace_vlm.evals.tasks.prompts import card_choice, kit_choice, pictures_first
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

_RULES = rules(lmms_letter, card=card_last_letter)
_OWN_ENDING = " Please answer yes or no."
_LMMS_ENDING = "\nAnswer with the option's letter from the given choices directly"


class MMStar(ReadByRule):
    rules = _RULES
    about = About(
        name="mmstar",
        title="MMStar",
        licence="none stated",
        source="Lin-Chen/MMStar",
        revision="main",
        columns=(
            Column("index"),
            Column("question"),
            Column("image", "picture"),
            Column("answer"),
            Column("category"),
            Column("l2_category"),
            Column("meta_info", optional=True, nullable=True),
            *(Column(letter, optional=True, nullable=True) for letter in "ABCD"),
        ),
        num_rows={"questions": 1500, "categories": 6, "sub-categories": 18},
        patterns=("*.parquet", "**/*.parquet"),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        files = find_files(folder, ("MMStar.tsv",), ("*.tsv",), ("*.parquet",), about=self.about)
        if len(files) > 1 and files[0].suffix == ".tsv":
            raise DataError(f"{folder} has {len(files)} .tsv files; expected one: give the file itself")
        docs: list[Doc] = []
        for file in files:
            for cells, pictures in read_table(file, self.about.columns, self.about.title):
                docs.append(_doc(cells, the_picture(cells, pictures), len(docs)))
        return Docs(tuple(docs))

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        checked = checked_profile(self.about, profile)
        options = {letter: text for letter, text in doc.options.items() if text}
        if checked == "lmms":
            # The text ``<image 1>`` stays: it is lmms-eval's ``mmstar_oc`` that takes it away.
            question = doc.question.strip().replace(_OWN_ENDING, "")
            return pictures_first(doc, question + _listed(question, options) + _LMMS_ENDING)
        if checked == "kit":
            return pictures_first(doc, kit_choice(doc.question, options))
        if options:
            return pictures_first(doc, card_choice(doc.question, {k: v.strip() for k, v in options.items()}))
        ending = "Answer with only the option letter (A, B, C, or D)."
        return pictures_first(doc, f"{doc.question.strip()}\n\n{ending}")

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(
            checked_profile(self.about, profile), lmms=128, card=64
        )  # of its .slurm; the script's own default is 8

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        metrics = {"mean": accuracy(records), "macro": _macro(records)}
        headline = "macro" if checked == "lmms" else "mean"
        categories = ("category", "l2_category")
        return report(self.about.name, checked, records, metrics, headline, accuracy, categories)


def _listed(question: str, options: Mapping[str, str]) -> str:
    """Options as the Parquet's questions have them, for one of the TSV, which has them in columns alone."""
    if not options or all(text.strip() in question for text in options.values()):
        return ""
    return "\nOptions: " + ", ".join(f"{letter}: {text.strip()}" for letter, text in options.items())


def _macro(records: Sequence[Record]) -> Metric:
    return macro(records, "l2_category")


def _doc(cells: Cells, picture: Picture, row: int) -> Doc:
    options = {letter: text for letter in "ABCD" if (text := cells.optional_text(letter)) is not None}
    options = options or dict.fromkeys("ABCD", "")
    check_options(cells, options)
    return Doc(
        id=cells.text("index"),
        row=row,
        kind="choice",
        question=cells.text("question"),
        gold=gold_letter(cells, "answer", options),
        images=(picture,),
        options=options,
        columns={"category": cells.text("category"), "l2_category": cells.text("l2_category")},
    )
