"""Training rows in the kinds of the toy suite: the same drawings from other seeds, asked as ``grace eval`` asks.

A unit is a part of one benchmark of one seed: it is written in its own layout, read by its task, and every distinct
prompt of the profiles becomes a question; MMBench's rotations, of which each picture has some, take turns at them.
Seeds begin at a million, so that a suite of a smaller seed shares none; of the suite of seed 0 no picture is used even
by chance. Of SEED-Bench the two types that show easy-VQA's test pictures are left out, and of MMMU the card's prompts,
which lose pictures.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from grace_vlm.data.rows import IMAGE_MARKER
from grace_vlm.data.sources.questions import Question
from grace_vlm.data.sources.world.drawn import Drawn
from grace_vlm.evals.tasks.open_answers import gold_answers
from grace_vlm.evals.tasks.registry import task_named
from grace_vlm.evals.tasks.task import Doc, Part, Profile, Task
from grace_vlm.evals.toy import ai2d, hallusion, mmbench, mmmu, mmstar, scienceqa, seed_bench

FIRST_SEED = 1_000_000
FRACTIONS = {"train": 0.25, "test": 0.08}
"""Split -> how much of a benchmark a unit takes."""
_MODULES = (hallusion, mmbench, scienceqa, ai2d, mmmu, seed_bench, mmstar)
_PROFILES: tuple[Profile, ...] = ("strict", "lmms", "kit")
_EASY_VQA = ("Instance Identity", "Instance Attributes")
Found = dict[tuple[bytes, ...], list[Question]]
"""Pictures -> what is asked of them."""
_TASKS = {"ai2d": ("ai2d", "ai2d_no_mask")}


class SuiteSource:
    """Rows in the kinds of seven benchmarks (``drawn.Source``)."""

    rows_per_unit: ClassVar[Mapping[str, float]] = {"train": 104.0, "test": 34.0}

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._taken = {hashlib.sha256(data).digest() for module in _MODULES for data in _pictures(module.NAME, 0)}

    def unit(self, split: str, number: int) -> list[Drawn]:
        """A part of one benchmark's pictures, another benchmark for each of seven numbers in a row."""
        module = _MODULES[number % len(_MODULES)]
        suite_seed = FIRST_SEED + 1_000 * self._seed + 2 * (number // len(_MODULES)) + (split == "test")
        found: Found = {}
        for images, questions in _asked(module.NAME, suite_seed):
            if not any(hashlib.sha256(image).digest() in self._taken for image in images):
                found.setdefault(images, []).extend(questions)
        rng, drawn = random.Random(f"{suite_seed}/world/{module.NAME}"), []
        for images, questions in _part(rng, found, FRACTIONS[split]).items():
            distinct = list({one.text: one for one in questions}.values())
            # Without a picture nothing holds questions together.
            groups = [distinct] if images else [[one] for one in distinct]
            drawn += [Drawn(images, ".png", tuple(group), "") for group in groups]
        return drawn


def _part(rng: random.Random, found: Found, fraction: float) -> Found:
    """Some of what has pictures, and of what has none."""
    chosen: Found = {}
    for images, questions in found.items():
        kept = questions if images else rng.sample(questions, round(fraction * len(questions)))
        if not images or rng.random() < fraction:
            chosen[images] = kept
    return chosen


def _asked(benchmark: str, seed: int) -> Iterator[tuple[tuple[bytes, ...], list[Question]]]:
    """(pictures, their questions) of every row."""
    for task, doc in _docs(benchmark, seed):
        by_text: dict[tuple[bytes, ...], dict[str, Question]] = {}
        turn = int(doc.id) // mmbench.ROTATION_STEP if benchmark == mmbench.NAME else None
        for profile in _PROFILES if turn is None else (_PROFILES[turn % len(_PROFILES)],):
            if profile in task.about.profiles:
                images, text = _prompt(task.prompt(doc, profile))
                by_text.setdefault(images, {})[text] = Question(f"suite_{benchmark}", doc.kind, text, answer(doc))
        for images, questions in by_text.items():
            yield images, list(questions.values())


def answer(doc: Doc) -> str:
    """What is to be said: a letter, Yes or No, or the first of the open answers."""
    if doc.kind == "yes_no":
        return doc.gold.capitalize()
    return doc.gold if doc.kind == "choice" else gold_answers(doc.gold)[0]


def _prompt(parts: tuple[Part, ...]) -> tuple[tuple[bytes, ...], str]:
    """The pictures in order, and the text with a marker for each, or without any where they all come first."""
    images = tuple(part.load() for part in parts if not isinstance(part, str))
    num_first = next((number for number, part in enumerate(parts) if isinstance(part, str)), len(parts))
    if num_first == len(images):
        return images, "".join(part for part in parts if isinstance(part, str)).strip()
    return images, "".join(part if isinstance(part, str) else IMAGE_MARKER for part in parts).strip()


def _docs(benchmark: str, seed: int) -> Iterator[tuple[Task, Doc]]:
    (module,) = (module for module in _MODULES if benchmark == module.NAME)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / benchmark
        module.write(folder, seed)
        for task_name in _TASKS.get(benchmark, (benchmark,)):
            task = task_named(task_name)
            for doc in task.docs(folder):
                if doc.columns.get("question_type") not in _EASY_VQA:
                    yield task, doc


def _pictures(benchmark: str, seed: int) -> Iterator[bytes]:
    for _, doc in _docs(benchmark, seed):
        for picture in doc.images:
            yield picture.load()
