"""POPE: is a thing in the picture? 3,000 questions on 500 pictures in each of three categories, half of them yes.

``card`` is LLaVA-1.5's script, which GRACE's LLaVA rows could have used: no GRACE script asks POPE. A positive is yes.
lmms-eval's recall leaves unparsed replies out; ours and VLMEvalKit's count them as misses. LLaVA prints F1 by category;
its papers print the mean of the three. Intervals: bootstrap over pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grace_vlm.evals.tasks.aggregate import Unit, by_value, clustered, questions, report
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
from grace_vlm.evals.tasks.yes_no import kit_yes_no, lmms_whole, pope_yes_no

_RULES = yes_no_rules({"card": pope_yes_no, "lmms": lmms_whole, "kit": kit_yes_no, "strict": strict_yes_no})


class POPE(ReadByRule):
    rules = _RULES
    about = About(
        name="pope",
        title="POPE",
        licence="MIT",
        source="lmms-lab/POPE",
        revision="main",
        columns=(
            Column("question_id"),
            Column("question"),
            Column("answer"),
            Column("image_source"),
            Column("image", "picture"),
            Column("category"),
        ),
        num_rows={"questions": 9000, "of a category": 3000},
        patterns=("data/test-*.parquet",),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        docs: list[Doc] = []
        for file in find_files(folder, ("test-*.parquet",), ("*.parquet",), about=self.about):
            for cells, pictures in read_table(file, self.about.columns, self.about.title):
                gold = cells.text("answer").strip().lower()
                if gold not in ("yes", "no"):
                    raise cells.fault("answer", "yes or no")
                category, picture = cells.text("category"), the_picture(cells, pictures)
                columns = {"category": category, "picture": cells.text("image_source")}
                doc_id, question = f"{category}/{cells.text('question_id')}", cells.text("question")
                docs.append(Doc(doc_id, len(docs), "yes_no", question, gold, (picture,), columns=columns))
        return Docs(tuple(docs))

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        if checked_profile(self.about, profile) == "kit":
            return (*doc.images, doc.question)
        return (*doc.images, f"{doc.question.strip()}\n{LMMS_SHORT_ENDING}")

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=128, card=128)

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        said_yes = [record for record in records if record.extract.value == "yes"]
        are_yes = [record for record in records if record.gold == "yes"]
        if checked == "lmms":
            are_yes = [record for record in are_yes if record.extract.status == "ok"]
        metrics = {
            "accuracy": _accuracy(records),
            "F1": clustered([f1_units(records)]),
            "F1 by category": clustered([f1_units(part) for part in by_value(records, "category").values()]),
            "precision": _accuracy(said_yes),
            "recall": _accuracy(are_yes),
            "yes ratio": clustered([_said_yes(records)]),
        }
        headline = {"card": "F1 by category", "lmms": "accuracy", "kit": "F1", "strict": "F1"}[checked]
        return report(self.about.name, checked, records, metrics, headline, _accuracy, ("category",))


def _accuracy(records: Sequence[Record]) -> Metric:
    return clustered([questions(records, "picture")])


def f1_units(records: Sequence[Record]) -> list[Unit]:
    """F1 = 2 TP / (2 TP + FP + FN) as a weighted mean: a true positive is 1 with weight 2, a wrong reply that is a
    false positive or a miss 0 with weight 1."""
    units = []
    for record in records:
        is_scored = record.extract.status != "error"
        said, is_yes = record.extract.value == "yes", record.gold == "yes"
        if said and is_yes:
            units.append(Unit(record.groups["picture"], 1.0, is_scored, 2.0))
        elif said or is_yes:
            units.append(Unit(record.groups["picture"], 0.0, is_scored))
    return units


def _said_yes(records: Sequence[Record]) -> list[Unit]:
    return [
        Unit(one.groups["picture"], float(one.extract.value == "yes"), one.extract.status != "error") for one in records
    ]
