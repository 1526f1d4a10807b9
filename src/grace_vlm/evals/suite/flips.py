"""Which answers turned from one evaluation to another: right to wrong (lost), wrong to right (won), row by row.

Two models of one accuracy may answer a tenth of the questions differently; an average hides it, rows do not. Everything
is read from the records of two ``grace eval --suite`` folders. A prompt and its pictures are not in there: they are
made again from the benchmarks' files, where these are given and still what they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from grace_vlm.errors import ConfigError
from grace_vlm.evals.statistics import holm, mcnemar_p
from grace_vlm.evals.suite.categories import main_column
from grace_vlm.evals.suite.paired import Difference, Lines, difference, read_records, require_same_data
from grace_vlm.evals.suite.questions import Question, text_hash
from grace_vlm.evals.suite.run import read_benchmarks
from grace_vlm.evals.suite.tables import read_reports
from grace_vlm.evals.tasks.task import Profile

Turn = Literal["lost", "won"]


@dataclass(frozen=True)
class Side:
    """What one of the two said: as it came, what was read from it (None: unparsed), and by which rule."""

    raw: str | None
    parsed: str | None
    rule: str


@dataclass(frozen=True)
class Flip:
    """A row whose outcome turned. ``category``: of its benchmark's main column, "" of a benchmark without one.

    Args:
        prompt: as it was asked, ``[picture]`` where one stood; None without the benchmark's files.
        pictures: SHA-256 of each, as the answers have them. base, own: before and after.
    """

    task: str
    id: str
    turn: Turn
    category: str
    question: str
    options: Mapping[str, str]
    gold: str
    prompt: str | None
    pictures: tuple[str, ...]
    base: Side
    own: Side

    def line(self) -> dict[str, Any]:
        """Of ``flips.jsonl``."""
        return asdict(self)


@dataclass(frozen=True)
class Count:
    """Of a task (``category`` None) or of one category of it, with McNemar's exact p of the two numbers."""

    task: str
    category: str | None
    num_rows: int
    num_lost: int
    num_won: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Two evaluations: ``differences`` of each task with ``adjusted`` p values (Holm), counts by task and category, and
    the rows that turned."""

    profile: str
    differences: tuple[Difference, ...]
    adjusted: tuple[float, ...]
    counts: tuple[Count, ...]
    flips: tuple[Flip, ...]


def compare_suites(base: Path, own: Path, profile: str) -> Comparison:
    """``own`` against ``base``, on the tasks that both have.

    Raises:
        ConfigError: no scores of the profile, no task in common, or other rows.
    """
    theirs, mine = read_records(base, profile), read_records(own, profile)
    tasks = [task for task in theirs if task in mine]
    if not tasks:
        raise ConfigError(
            f"{base} has {', '.join(theirs)} and {own} {', '.join(mine)}; compare evaluations of a common benchmark"
        )
    require_same_data(own, base, tasks)
    columns = {task: main_column(report["breakdown"]) for task, report in read_reports(base, profile).items()}
    differences, counts, flips = [], [], []
    for task in tasks:
        found = difference(task, mine[task], theirs[task])
        column = columns.get(task)
        differences.append(found)
        counts += _counts(task, column, theirs[task], mine[task])
        turned: dict[str, Turn] = {**dict.fromkeys(found.lost, "lost"), **dict.fromkeys(found.won, "won")}
        pairs = zip(theirs[task], mine[task], strict=True)
        flips += [_flip(task, column, turned[str(b["id"])], b, o) for b, o in pairs if str(b["id"]) in turned]
    adjusted = holm([one.p_value for one in differences])
    return Comparison(profile, tuple(differences), tuple(adjusted), tuple(counts), tuple(flips))


def _category(line: Mapping[str, Any], column: str | None) -> str:
    return "" if column is None else str(line["groups"].get(column, ""))


def _counts(task: str, column: str | None, base: Lines, own: Lines) -> list[Count]:
    """The task's own, then one a category."""
    outcomes: dict[str | None, list[tuple[bool, bool]]] = {None: []}
    for before, after in zip(base, own, strict=True):
        pair = (before["score"] == 1.0, after["score"] == 1.0)
        outcomes[None].append(pair)
        if column is not None:
            outcomes.setdefault(_category(before, column), []).append(pair)
    ordered = [None, *sorted(category for category in outcomes if category is not None)]
    return [_count(task, category, outcomes[category]) for category in ordered]


def _count(task: str, category: str | None, pairs: Sequence[tuple[bool, bool]]) -> Count:
    tally = Counter(pairs)
    p_value = mcnemar_p([before for before, _ in pairs], [after for _, after in pairs])
    return Count(task, category, len(pairs), tally[True, False], tally[False, True], p_value)


def _flip(task: str, column: str | None, turn: Turn, base: Mapping[str, Any], own: Mapping[str, Any]) -> Flip:
    before, after = (Side(line["raw"], line["parsed"], line["rule"]) for line in (base, own))
    return Flip(
        task=task,
        id=str(base["id"]),
        turn=turn,
        category=_category(base, column),
        question=base["question"],
        options=base["options"],
        gold=base["gold"],
        prompt=None,
        pictures=tuple(base["pictures"]),
        base=before,
        own=after,
    )


def asked_again(
    comparison: Comparison, base: Path, data: Path, profile: Profile
) -> tuple[Comparison, dict[tuple[str, str], Question]]:
    """The same with the prompts, and each flip's question by (task, id), whose pictures can be had.

    Args:
        data: the folder of the benchmarks that both were asked.

    Raises:
        ConfigError: it has other files, or lacks a benchmark. DataError: a file that cannot be read.
    """
    tasks = sorted({flip.task for flip in comparison.flips})
    if not tasks:
        return comparison, {}
    wanted = {(flip.task, flip.id) for flip in comparison.flips}
    asked = {
        (one.task.about.name, doc.id): one.question(doc, profile)
        for one in read_benchmarks(tasks, data, wants_all=True)[0]
        for doc in one.docs
        if (one.task.about.name, doc.id) in wanted
    }
    records = read_records(base, profile)
    hashes = {(task, str(line["id"])): line["prompt"] for task in tasks for line in records[task]}
    for key in sorted(wanted):
        if key not in asked or (hashes[key] and hashes[key] != text_hash(asked[key])):
            raise ConfigError(
                f"{data} does not ask row {key[1]} of {key[0]} as {base} was asked; give the --data of then"
            )
    flips = tuple(replace(flip, prompt=asked[flip.task, flip.id].text) for flip in comparison.flips)
    return replace(comparison, flips=flips), asked
