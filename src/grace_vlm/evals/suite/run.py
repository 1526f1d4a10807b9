"""An evaluation: benchmarks of a folder, questions that have no answer yet, answers to a ledger, scores from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.atomic import write_json_atomic
from grace_vlm.checkpoint.manifest import MARKER
from grace_vlm.errors import ConfigError
from grace_vlm.evals.suite.ledger import Ledger, Reply, read_identity
from grace_vlm.evals.suite.questions import MOST_NEW_TOKENS, Benchmark, Question, digest_of, in_shard
from grace_vlm.evals.suite.responders import Responder
from grace_vlm.evals.suite.score import as_json, score, write_lines
from grace_vlm.evals.tasks.readers import local_source
from grace_vlm.evals.tasks.registry import TASKS, task_named
from grace_vlm.evals.tasks.task import Docs, Profile, Report

SUITES: Mapping[str, tuple[str, ...]] = {
    "card": ("hallusion", "mmbench", "scienceqa", "ai2d", "mmmu", "seed", "mmstar"),
    "all": tuple(TASKS),
}
"""Names of tasks by suite; ``card`` has the columns of the model card's table, in its order."""
_EDGE = 1 << 20


HUB = Path("hub")
"""In place of a folder of benchmarks: each from where it is published."""


@dataclass(frozen=True)
class Part:
    """Which share of the questions is asked: ``number`` (from 0) of ``of``."""

    number: int = 0
    of: int = 1


def read_benchmarks(
    names: Sequence[str],
    folder: Path,
    limit: int | None = None,
    wants_all: bool = False,
    most_new_tokens: int = MOST_NEW_TOKENS,
) -> tuple[list[Benchmark], list[str]]:
    """(benchmarks of ``folder``, names that it has no sub-folder for).

    Args:
        folder: has a folder, or a link to one, of each task's name; ``hub``, where no such folder is: each task's own
            data set on the Hub is fetched. limit: of rows of each. wants_all: a missing one is an error.
            most_new_tokens: of an answer.

    Raises:
        ConfigError: none of them is there, or one is missing that was asked for. DataError: files that cannot be read.
    """
    found, missing = [], []
    from_hub = folder == HUB and not folder.exists()
    for name in names:
        task = task_named(name)
        source = local_source(task.about.source, task.about) if from_hub else folder / name
        if not source.exists():
            missing.append(name)
            continue
        docs = task.docs(source)
        kept = docs if limit is None else Docs(docs.docs[:limit], docs.skipped)
        found.append(Benchmark(task, kept, digest_of(source), most_new_tokens))
    if not found or (missing and wants_all):
        raise ConfigError(
            f"{folder} has no folder {', '.join(missing)}; give each benchmark's files in a folder of its task's name "
            "(docs/evaluation.md)"
        )
    return found, missing


def weights_digest(model: str) -> str:
    """Of a model's files: the manifest's hash where the folder is sealed, else names, sizes and both ends of each."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    if (folder / MARKER).is_file():
        return (folder / MARKER).read_text(encoding="utf-8").split()[0][:32]
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            found.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            found.update(file.read(_EDGE))
    return found.hexdigest()[:32]


def questions_of(benchmarks: Sequence[Benchmark], profiles: Sequence[Profile], part: Part = Part()) -> list[Question]:
    """Of a part, every distinct one."""
    asked = (question for one in benchmarks for question in one.questions(profiles))
    return [question for question in asked if in_shard(question, part.number, part.of)]


def ask(
    benchmarks: Sequence[Benchmark],
    profiles: Sequence[Profile],
    responder: Responder,
    ledger: Ledger,
    part: Part = Part(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Every question of the part that the ledger has no answer to, once."""
    wanted = questions_of(benchmarks, profiles, part)
    todo = [question for question in wanted if not ledger.has(question.key)]
    done = len(wanted) - len(todo)
    progress(done, len(wanted))
    with ledger.writing():
        for reply in responder.answers(todo):
            ledger.add(reply)
            done += 1
            progress(done, len(wanted))


def what_is_here(benchmark: Benchmark, toy_rows: Mapping[str, int]) -> str | None:
    """A sentence on a benchmark that has not as many rows as any published form of it; None for one that has.

    Args:
        toy_rows: of a toy suite, how many rows each benchmark was made with.
    """
    about, count = benchmark.task.about, len(benchmark.docs.docs)
    if about.name in toy_rows:
        whole = toy_rows[about.name]
        return None if count == whole else f"{about.title}: {count:,} rows are here, the toy suite has {whole:,}"
    if count in about.num_rows.values():
        return None
    published = ", ".join(f"{number:,} ({name})" for name, number in about.num_rows.items())
    return f"{about.title}: {count:,} rows are here, published are {published}"


def strange_answers(benchmarks: Sequence[Benchmark], replies: Mapping[str, Reply]) -> int:
    """Answers to questions of these tasks that their rows do not ask under any profile: of other files."""
    asked = {one.task.about.name for one in benchmarks}
    if not any(reply.task in asked for reply in replies.values()):
        return 0
    known = {question.key for one in benchmarks for question in one.questions(one.task.about.profiles)}
    return sum(reply.task in asked and reply.key not in known for reply in replies.values())


def missing_answers(benchmarks: Sequence[Benchmark], profiles: Sequence[Profile], replies: Mapping[str, Reply]) -> int:
    """Questions that nobody has asked: other parts' work."""
    return sum(question.key not in replies for question in questions_of(benchmarks, profiles))


def write_scores(
    benchmarks: Sequence[Benchmark],
    profiles: Sequence[Profile],
    replies: Mapping[str, Reply],
    out: Path,
    limit: int | None,
) -> dict[Profile, dict[str, Report]]:
    """Records of every row and ``scores.json``, from the replies alone. What stands there of other profiles and tasks
    stays, if it is of the same rows."""
    reports: dict[Profile, dict[str, Report]] = {}
    for profile in profiles:
        for benchmark in benchmarks:
            if profile not in benchmark.known(profiles):
                continue
            name = benchmark.task.about.name
            lines, report = score(benchmark, profile, replies)
            write_lines(out / "records" / profile / f"{name}.jsonl", lines)
            reports.setdefault(profile, {})[name] = report
    data = {one.task.about.name: f"{one.data} {len(one.docs)} rows" for one in benchmarks}
    scores = {profile: {name: as_json(one) for name, one in own.items()} for profile, own in reports.items()}
    before = _scores_before(out / "scores.json", data)
    for profile, own in before["scores"].items():
        scores[profile] = {**own, **scores.get(profile, {})}
    content: dict[str, Any] = {
        "format_version": 1,
        "run": read_identity(out),
        "limit": limit,
        "skipped": {one.task.about.name: dict(one.docs.skipped) for one in benchmarks if one.docs.skipped},
        "data": {**before["data"], **data},
        "scores": scores,
    }
    write_json_atomic(out / "scores.json", content)
    return reports


def require_no_fewer_rows(out: Path, limit: int | None) -> None:
    """``ConfigError`` where ``out`` has scores of more rows than ``limit`` asks: they would be replaced."""
    path = out / "scores.json"
    if limit is None or not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["limit"]
    if before is None or before > limit:
        of = "all rows" if before is None else f"the first {before} rows"
        raise ConfigError(f"{out} has scores of {of}, which --limit {limit} would replace; pass another --out")


def _scores_before(path: Path, data: Mapping[str, str]) -> dict[str, Any]:
    """Scores and data of an earlier run, without tasks whose rows are others now."""
    if not path.is_file():
        return {"scores": {}, "data": {}}
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: rows for name, rows in before["data"].items() if data.get(name, rows) == rows}
    scores = {p: {name: one for name, one in own.items() if name in kept} for p, own in before["scores"].items()}
    return {"scores": {profile: own for profile, own in scores.items() if own}, "data": kept}


def same_numbers(options: Any) -> dict[str, Any]:
    """Of an engine's options those that an answer may hang on."""
    names = ("batch_invariant", "kv_cache", "int8_head", "cpu_activations")
    return {name: value for name, value in dataclasses.asdict(options).items() if name in names}
