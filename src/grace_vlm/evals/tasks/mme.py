"""MME: two yes/no questions about each picture, one of each answer, in 14 categories.

A category's score is 100 times the accuracy plus 100 times the share of pictures whose two questions are both right.
``perception`` sums ten categories (at most 2,000), ``cognition`` four (800), ``total`` both. ``card`` is LLaVA-1.5's
way, which has MME's official parser as lmms-eval has. Intervals: bootstrap over pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.aggregate import by_value, clustered, groups_right, questions, report
from grace_vlm.evals.tasks.choice import ReadByRule, budget, the_picture, yes_no_rules
from grace_vlm.evals.tasks.columns import Column
from grace_vlm.evals.tasks.prompts import LMMS_SHORT_ENDING
from grace_vlm.evals.tasks.readers import find_files, local_source, read_table
from grace_vlm.evals.tasks.strict import strict_yes_no
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
from grace_vlm.evals.tasks.yes_no import kit_yes_no, mme_yes_no

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_RULES = yes_no_rules({"card": mme_yes_no, "lmms": mme_yes_no, "kit": kit_yes_no, "strict": strict_yes_no})
_OWN_ENDING = " Please answer yes or no."


class MME(ReadByRule):
    rules = _RULES
    about = About(
        name="mme",
        title="MME",
        licence="none stated",
        source="lmms-lab/MME",
        revision="main",
        columns=(
            Column("question_id"),
            Column("image", "picture"),
            Column("question"),
            Column("answer"),
            Column("category"),
        ),
        num_rows={"questions": 2374, "categories": 14},
        patterns=("data/test-*.parquet",),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        docs: list[Doc] = []
        asked: Counter[str] = Counter()
        for file in find_files(folder, ("test-*.parquet",), ("*.parquet",), about=self.about):
            for cells, pictures in read_table(file, self.about.columns, self.about.title):
                gold = cells.text("answer").strip().lower().replace(".", "")
                if gold not in ("yes", "no"):
                    raise cells.fault("answer", "yes or no")
                category = cells.text("category")
                if category not in (*PERCEPTION, *COGNITION):
                    raise cells.fault("category", f"one of {', '.join((*PERCEPTION, *COGNITION))}")
                pair = f"{category}/{cells.text('question_id')}"
                asked[pair] += 1
                columns, images = {"category": category, "picture": pair}, (the_picture(cells, pictures),)
                doc_id, question = f"{pair}/{asked[pair]}", cells.text("question")
                docs.append(Doc(doc_id, len(docs), "yes_no", question, gold, images, columns=columns))
        odd = next((pair for pair, number in asked.items() if number != 2), None)
        if odd is not None:
            raise DataError(f"{folder} has {asked[odd]} questions for {odd}; expected 2 a picture: fetch it again")
        return Docs(tuple(docs))

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        if checked_profile(self.about, profile) == "kit":
            return (*doc.images, doc.question)
        return (*doc.images, f"{doc.question.strip().replace(_OWN_ENDING, '')}\n{LMMS_SHORT_ENDING}")

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=16, card=128)

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        metrics = {
            "total": _sum(records),
            "perception": _sum([record for record in records if record.groups["category"] in PERCEPTION]),
            "cognition": _sum([record for record in records if record.groups["category"] in COGNITION]),
            "accuracy": clustered([questions(records, "picture")]),
        }
        headline = "perception" if checked in ("card", "lmms") else "total"
        return report(self.about.name, checked, records, metrics, headline, _sum, ("category",))


def _sum(records: Sequence[Record]) -> Metric:
    """The sum of the categories' scores, each at most 200."""
    parts = list(by_value(records, "category").values())
    components = [
        units for part in parts for units in (questions(part, "picture"), groups_right(part, "picture", "picture"))
    ]
    return clustered(components, "questions and pictures", upper=200.0 * max(1, len(parts)))
