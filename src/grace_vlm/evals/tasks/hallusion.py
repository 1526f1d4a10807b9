"""HallusionBench: yes/no questions about figures and their edited twins, and some without any figure.

    aAcc   questions that are right
    fAcc   figures (category, subcategory, set, figure) whose questions are all right; rows with a picture only
    qAcc   questions (category, subcategory, set, question) that are right on all figures, and without one
    mean   of the three

Rows: 951 with a picture (split ``image``) and 178 without (``non_image``). The GRACE scripts count all of them;
VLMEvalKit and Qwen count the 951 and print the mean. Both populations are reported. lmms-eval's task needs a GPT judge,
so there is no profile ``lmms``. Intervals: bootstrap over sets, inside which figures and questions cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from grace_vlm.evals.tasks.aggregate import clustered, groups_right, questions, report
from grace_vlm.evals.tasks.choice import ReadByRule, budget, yes_no_rules
from grace_vlm.evals.tasks.columns import EXPECTED, Column
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
    columns_of,
)
from grace_vlm.evals.tasks.yes_no import card_yes_no, kit_yes_no

_RULES = yes_no_rules({"card": card_yes_no, "kit": kit_yes_no, "strict": strict_yes_no})
_NO_IMAGE = Column("image", "picture", optional=True, nullable=True)
_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")


class HallusionBench(ReadByRule):
    rules = _RULES
    about = About(
        name="hallusion",
        title="HallusionBench",
        licence="BSD-3-Clause",
        source="lmms-lab/HallusionBench",
        revision="main",
        columns=(
            *(
                Column(name)
                for name in ("category", "subcategory", "visual_input", *_KEYS[2:], "question", "gt_answer")
            ),
            Column("gt_answer_details", nullable=True),
            Column("image", "picture", nullable=True),
        ),
        num_rows={"all": 1129, "image": 951, "text": 178},
        patterns=("**/image-*.parquet", "**/non_image-*.parquet", "image-*.parquet", "non_image-*.parquet"),
        profiles=("card", "kit", "strict"),
    )

    def docs(self, source: str | Path) -> Docs:
        folder = local_source(source, self.about)
        files = find_files(folder, ("image-*.parquet", "non_image-*.parquet"), ("*.parquet",), about=self.about)
        docs: list[Doc] = []
        for file in files:
            shows = file.name.startswith("image-")
            columns = self.about.columns if shows else (*self.about.columns[:-1], _NO_IMAGE)
            for cells, pictures in read_table(file, columns, self.about.title):
                if shows and not pictures:
                    raise cells.fault("image", EXPECTED["picture"])
                gold = cells.text("gt_answer").strip()
                if gold not in ("0", "1"):
                    raise cells.fault("gt_answer", "1 for yes or 0 for no")
                keys = columns_of({name: cells.text(name) for name in ("visual_input", *_KEYS)})
                doc_id = "/".join(keys[name] for name in _KEYS) + ("" if pictures else "/text")
                question, images = cells.text("question"), tuple(pictures.values())
                answer = "yes" if gold == "1" else "no"
                docs.append(Doc(doc_id, len(docs), "yes_no", question, answer, images, columns=keys))
        return Docs(tuple(docs))

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]:
        if checked_profile(self.about, profile) == "kit":
            return (*doc.images, doc.question)
        return (*doc.images, f"{doc.question.strip()}\nAnswer with only 'Yes' or 'No'.")

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int:
        return budget(checked_profile(self.about, profile), lmms=128)

    def groups(self, doc: Doc) -> Mapping[str, str]:
        category, subcategory, set_id, figure, question = (doc.columns[name] for name in _KEYS)
        of_set = f"{category}/{subcategory}/{set_id}"
        return {
            "population": "image" if doc.images else "text",
            "category": category,
            "subcategory": f"{category}/{subcategory}",
            "set": of_set,
            "figure": f"{of_set}/{figure}",
            "question": f"{of_set}/{question}",
        }

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report:
        checked = checked_profile(self.about, profile)
        with_image = [record for record in records if record.groups["population"] == "image"]
        metrics = _metrics(records, with_image)
        metrics |= {f"{name} image": metric for name, metric in _metrics(with_image, with_image).items()}
        # The card does not say which of its numbers it took; its plain accuracy is the first that the script prints.
        headline = "aAcc" if checked == "card" else "mean image"
        categories = ("population", "category", "subcategory")
        return report(self.about.name, checked, records, metrics, headline, _accuracy, categories)


def _accuracy(records: Sequence[Record]) -> Metric:
    return clustered([questions(records, "set")])


def _metrics(records: Sequence[Record], with_image: Sequence[Record]) -> dict[str, Metric]:
    rows, figures = questions(records, "set"), groups_right(with_image, "figure", "set")
    asked = groups_right(records, "question", "set")
    return {
        "aAcc": clustered([rows]),
        "fAcc": clustered([figures], "figures"),
        "qAcc": clustered([asked], "questions on all figures"),
        "mean": clustered([rows, figures, asked], "questions, figures and questions on all figures"),
    }
