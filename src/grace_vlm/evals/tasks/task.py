"""What a benchmark is: rows -> questions -> prompts -> answers -> scores.

A ``Task`` says how the real files of a benchmark are read (``docs``), what a model is asked (``prompt``), what its
reply means (``extract``), whether that is right (``score``), which rows belong together (``groups``) and what is
reported (``aggregate``). Generating lies between ``prompt`` and ``extract`` and is not a task's business.

A *profile* is a whole way of asking and counting; a number without its profile means nothing (shared/evaluation.md 0):

    card     prompts, parsers and aggregates of the scripts that GRACE published, bit for bit; for benchmarks that it
             has no script for, those of LLaVA-1.5
    lmms     those of lmms-eval
    kit      those of VLMEvalKit with exact matching, Qwen's own convention
    strict   the card's prompts, sound extraction, each benchmark's own aggregate; the default

Where a peer draws a letter at random for a reply that it cannot read, we say ``unparsed``, and unparsed is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from grace_vlm.errors import ConfigError, DataError
from grace_vlm.evals.tasks.columns import Column

Profile = Literal["card", "lmms", "kit", "strict"]
PROFILES: tuple[Profile, ...] = ("card", "lmms", "kit", "strict")
Status = Literal["ok", "unparsed", "error"]
Kind = Literal["choice", "yes_no", "open"]


@dataclass(frozen=True)
class Picture:
    """A picture as it is stored. ``load`` reads its bytes, undecoded, each time it is called.

    Args:
        column: the column that it stands in. place: file and row, for errors.

    Raises:
        DataError: from ``load``, where the bytes cannot be had.
    """

    column: str
    place: str
    load: Callable[[], bytes] = field(repr=False, compare=False)


Part = str | Picture
"""A stretch of a prompt: text or a picture, in the order in which the model gets them."""


@dataclass(frozen=True)
class Doc:
    """One question of a benchmark.

    Args:
        id: unique within the benchmark. row: from 0, within all rows that ``docs`` yields.
        options: letter -> text, in order; empty where nothing is chosen. A letter that has no text is absent.
        gold: a letter, ``yes`` or ``no``, or the open answer as its column has it.
        images: in the order of their columns. answers: those of several people, where a benchmark has them.
        columns: the other cells that grouping needs, as text.
    """

    id: str
    row: int
    kind: Kind
    question: str
    gold: str
    images: tuple[Picture, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    hint: str | None = None
    answers: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Docs:
    """All questions of a source. ``skipped``: reason -> rows that are no part of the benchmark, such as videos."""

    docs: tuple[Doc, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """
        Raises:
            DataError: two questions have one id, by which their answers are kept.
        """
        seen: set[str] = set()
        for doc in self.docs:
            if doc.id in seen:
                raise DataError(f"row {doc.row} has the id {doc.id!r} of an earlier row; expected one of its own each")
            seen.add(doc.id)

    def __iter__(self) -> Iterator[Doc]:
        return iter(self.docs)

    def __len__(self) -> int:
        return len(self.docs)


@dataclass(frozen=True)
class Extract:
    """What a reply was taken to say, and by which rule. ``value`` is None unless ``status`` is ``ok``."""

    value: str | None
    rule: str
    status: Status

    @classmethod
    def ok(cls, value: str, rule: str) -> Extract:
        return cls(value, rule, "ok")

    @classmethod
    def unparsed(cls, rule: str = "none") -> Extract:
        return cls(None, rule, "unparsed")

    @classmethod
    def error(cls, reason: str) -> Extract:
        """For a question that got no reply; it counts as wrong."""
        return cls(None, reason, "error")


@dataclass(frozen=True)
class Record:
    """One scored question: all that ``aggregate`` needs, and plain enough for a line of JSON. ``score``: 0 to 1."""

    id: str
    gold: str
    groups: Mapping[str, str]
    extract: Extract
    score: float


@dataclass(frozen=True)
class Metric:
    """One number with its 95 % interval, as fractions unless ``upper`` is another maximum.

    Args:
        unit: what is counted: questions, figures, circular groups ...
        num_total: how many units there are. num_scored: those whose questions all got a reply; the others are wrong.
        interval: ``wilson``, or ``bootstrap`` over the clusters that ``aggregate`` of the task names.
    """

    value: float
    low: float
    high: float
    num_scored: int
    num_total: int
    unit: str
    interval: Literal["wilson", "bootstrap"]
    upper: float = 1.0


@dataclass(frozen=True)
class Report:
    """A benchmark's outcome under one profile.

    Args:
        headline: which of ``metrics`` the profile's own people print. breakdown: column -> value -> metric.
        rules: rule of extraction -> how often it was the one.
    """

    task: str
    profile: Profile
    headline: str
    metrics: Mapping[str, Metric]
    breakdown: Mapping[str, Mapping[str, Metric]]
    num_questions: int
    num_unparsed: int
    num_errors: int
    rules: Mapping[str, int]


@dataclass(frozen=True)
class About:
    """What a task is, for people.

    Args:
        source: hub id of the rows. revision: of that repository, or the file's own name for its version.
        columns: what its rows must have. num_rows: population -> rows of the real benchmark, to compare with.
        patterns: the files that are fetched for a hub id.
    """

    name: str
    title: str
    licence: str
    source: str
    revision: str
    columns: tuple[Column, ...]
    num_rows: Mapping[str, int]
    patterns: tuple[str, ...]
    profiles: tuple[Profile, ...] = PROFILES


class Task(Protocol):
    """A benchmark. ``source`` is a local file or folder in the benchmark's own layout, or a hub id.

    Raises:
        DataError: from ``docs``: a file that is missing or damaged, a column that is not there, a row without its
            picture or with a gold answer that is no option. Nothing is left out in silence.
        ConfigError: from all that take a profile, for one that the task does not have.
    """

    @property
    def about(self) -> About: ...

    def docs(self, source: str | Path) -> Docs: ...

    def prompt(self, doc: Doc, profile: Profile) -> tuple[Part, ...]: ...

    def max_new_tokens(self, doc: Doc, profile: Profile) -> int: ...

    def extract(self, raw: str, doc: Doc, profile: Profile) -> Extract: ...

    def score(self, doc: Doc, extract: Extract, profile: Profile) -> float: ...

    def groups(self, doc: Doc) -> Mapping[str, str]: ...

    def aggregate(self, records: Sequence[Record], profile: Profile) -> Report: ...


def checked_profile(about: About, profile: str) -> Profile:
    """``profile`` itself.

    Raises:
        ConfigError: the task has no such profile.
    """
    for known in about.profiles:
        if profile == known:
            return known
    raise ConfigError(f"{about.name} has no profile {profile!r}; choose one of {', '.join(about.profiles)}")


def record_of(task: Task, doc: Doc, raw: str, profile: Profile) -> Record:
    """A reply's record: extracted, scored, grouped."""
    extract = task.extract(raw, doc, profile)
    return Record(doc.id, doc.gold, task.groups(doc), extract, task.score(doc, extract, profile))


def failed_record(task: Task, doc: Doc, reason: str) -> Record:
    """The record of a question that got no reply."""
    return Record(doc.id, doc.gold, task.groups(doc), Extract.error(reason), 0.0)


def columns_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Cells as ``Doc.columns`` has them: text, and none for a cell that is empty."""
    return {name: str(value) for name, value in values.items() if value is not None}
