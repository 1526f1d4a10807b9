"""AI2D (test): questions about school diagrams. Two tasks with one layout.

In ``ai2d`` the labels that are asked for are masked by letters, as the card's, lmms-eval's ``ai2d`` and VLMEvalKit's
``AI2D_TEST`` are; ``ai2d_no_mask`` shows the labels and is another, easier task. The rows do not say which they are:
the source does. Intervals: bootstrap over diagrams, which are told apart by their bytes, since rows name none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grace_vlm.evals.tasks.aggregate import clustered, questions, report
from grace_vlm.evals.tasks.choice import ReadByRule, budget, check_options, gold_index, gold_letter, rules, the_picture
from grace_vlm.evals.tasks.columns import Column
from grace_vlm.evals.tasks.letters import lmms_ai2d_letter
from grace_vlm.evals.tasks.prompts import lettered, usual_choice
from grace_vlm.evals.tasks.readers import find_files, local_source, read_table
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

_RULES = rules(lmms_ai2d_letter)
_COLUMNS = (Column("question"), Column("options", "list"), Column("answer"), Column("image", "picture"))


def _about(name: str, title: str, source: str) -> About:
    patterns = ("data/*.parquet", "*.parquet")
    return About(name, title, "CC BY-SA 4.0", source, "main", _COLUMNS, {"questions": 3088}, patterns)


@dataclass(frozen=True)
class AI2D(ReadByRule):
    rules = _RULES
    about: About

    @property
    def is_masked(self) -> bool:
        return self.about.name == "ai2d"

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        unmasked = ("*no_mask*.parquet", "no_mask/*.parquet", "*unmasked*.parquet", "unmasked/*.parquet")
        masked = (("test-*.parquet",), ("*.parquet",), ("masked/*.parquet",), ("mask/*.parquet",))
        choices = (
            masked if self.is_masked else (*((pattern,) for pattern in unmasked), ("test-*.parquet",), ("*.parquet",))
        )
        files = find_files(folder, *choices, about=self.about)
        if self.is_masked and len(files) > 1:
            files = [file for file in files if not any(word in file.name for word in ("no_mask", "unmasked"))]
        docs: list[Doc] = []
        for file in files:
            for cells, pictures in read_table(file, self.about.columns, self.about.title):
                options = lettered(cells.texts("options"))
                check_options(cells, options)
                by_number = cells.text("answer").strip().lstrip("-").isdigit()
                gold = (gold_index if by_number else gold_letter)(cells, "answer", options)
                images, number = (the_picture(cells, pictures),), len(docs)
                # Once, as the rows go by: pictures of one row group are in memory together.
                columns = {"diagram": hashlib.sha256(images[0].load()).hexdigest()[:16]}
                question = cells.text("question")
                docs.append(Doc(str(number), number, "choice", question, gold, images, options, columns=columns))
        return Docs(tuple(docs))

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        return usual_choice(doc, checked_profile(self.about, profile))

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=16)

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        metrics = {"accuracy": _accuracy(records)}
        return report(self.about.name, checked, records, metrics, "accuracy", _accuracy, ())


def _accuracy(records: Sequence[Record]) -> Metric:
    return clustered([questions(records, "diagram")])


MASKED = AI2D(_about("ai2d", "AI2D", "lmms-lab/ai2d"))
UNMASKED = AI2D(_about("ai2d_no_mask", "AI2D without masks", "Efficient-Large-Model/ai2d-no-mask"))
