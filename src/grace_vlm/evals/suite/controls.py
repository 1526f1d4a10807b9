"""Controls: what a benchmark gives to whoever does not look. A score says something by its distance to these.

    blind      the same questions without their pictures
    shuffle    each question with the pictures of another, drawn by a seed; never of its own cluster (a set of figures,
               a question's rotations, one picture), so that no row keeps what it is about by chance
    majority   no model: the most frequent right answer among those that a row has. It is counted on the test itself,
               so it is the most that answering one thing can give

A control's answers have keys of their own and its folder, records and tables its name: they are no model's score.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from grace_vlm.errors import ConfigError
from grace_vlm.evals.suite.ledger import Reply
from grace_vlm.evals.suite.paired import cluster_of
from grace_vlm.evals.suite.questions import Benchmark, Question, text_hash
from grace_vlm.evals.tasks.task import Doc, Part, Picture

Name = Literal["blind", "shuffle", "majority"]
NAMES: tuple[Name, ...] = ("blind", "shuffle", "majority")


@dataclass(frozen=True)
class Blind:
    """No pictures."""

    name: str = "blind"

    def parts(self, doc: Doc, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(part for part in parts if isinstance(part, str))


@dataclass(frozen=True)
class Shuffled:
    """The pictures of ``donors[doc.id]``, again from the first where a row has more than they are."""

    donors: Mapping[str, tuple[Picture, ...]]
    name: str

    def parts(self, doc: Doc, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        made: list[Part] = []
        for part in parts:
            if isinstance(part, str):
                made.append(part)
                continue
            given = self.donors[doc.id]
            made.append(given[sum(not isinstance(one, str) for one in made) % len(given)])
        return tuple(made)


@dataclass(frozen=True)
class Majority:
    """Prompts as they are; ``MajorityResponder`` answers them."""

    name: str = "majority"

    def parts(self, doc: Doc, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return parts


def controlled(benchmark: Benchmark, name: str, seed: int = 0) -> Benchmark:
    """A benchmark under a control.

    Raises:
        ConfigError: no such control, or no pictures to exchange.
    """
    if name == "blind":
        return replace(benchmark, control=Blind())
    if name == "majority":
        return replace(benchmark, control=Majority())
    if name == "shuffle":
        return replace(benchmark, control=Shuffled(_donors(benchmark, seed), f"shuffle, seed {seed}"))
    raise ConfigError(f"--control is {name}; expected one of {', '.join(NAMES)}")


def _donors(benchmark: Benchmark, seed: int) -> dict[str, tuple[Picture, ...]]:
    """Doc id -> pictures of another row: the next in a drawn order that is of another cluster."""
    order = [doc for doc in benchmark.docs if doc.images]
    random.Random(seed).shuffle(order)
    clusters = [cluster_of(benchmark.task.groups(doc), doc.id) for doc in order]
    if len(set(clusters)) < 2:
        title = benchmark.task.about.title
        raise ConfigError(f"{title} has no two unrelated rows with pictures to exchange; leave out --control shuffle")
    found = {}
    for place, doc in enumerate(order):
        later = ((place + step) % len(order) for step in range(1, len(order)))
        found[doc.id] = order[next(at for at in later if clusters[at] != clusters[place])].images
    return found


class MajorityResponder:
    """Answers with the most frequent right answer, by task and kind of question; of a tie the first by name."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self._docs = {(one.task.about.name, doc.id): doc for one in benchmarks for doc in one.docs}
        self._counts: dict[tuple[str, str], Counter[str]] = {}
        for (task, _), doc in self._docs.items():
            self._counts.setdefault((task, doc.kind), Counter())[doc.gold] += 1

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        for one in questions:
            text = self._most_frequent(one.task, self._docs[one.task, one.doc_id])
            yield Reply(one.key, one.task, one.doc_id, text, "stop", None, text_hash(one))

    def _most_frequent(self, task: str, doc: Doc) -> str:
        counts = self._counts[task, doc.kind]
        possible = list(doc.options) if doc.options else sorted(counts)
        return min(possible, key=lambda answer: (-counts[answer], answer))
