"""``grace eval --suite``: benchmarks of a folder, answers in a ledger, scores by profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_vlm import __version__
from grace_vlm.cli.output import ProgressBar, emit_json, print_table, say
from grace_vlm.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.evals.suite.questions import Benchmark
    from grace_vlm.evals.suite.responders import Responder
    from grace_vlm.evals.suite.run import Part
    from grace_vlm.evals.tasks.task import Profile, Report


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated, as ``grace eval`` has it."""

    model: str
    data: Path
    suite: str
    tasks: tuple[str, ...]
    profiles: tuple[str, ...]
    out: Path
    resume: bool
    part: str
    limit: int | None
    max_new_tokens: int | None
    by: str | None = None
    control: str | None = None


@dataclass(frozen=True)
class By:
    """Who answers."""

    endpoint: str | None
    api_key: str | None
    stock: bool
    batch_size: int
    device: str
    options: EngineOptions


def run_suite(asked: Asked, by: By, as_json: bool) -> None:
    """Ask what has no answer yet, and write the scores when everything was asked."""
    from grace_vlm.checkpoint.lock import FolderLock
    from grace_vlm.evals.suite.ledger import Ledger
    from grace_vlm.evals.suite.questions import MOST_NEW_TOKENS
    from grace_vlm.evals.suite.run import (
        SUITES,
        ask,
        missing_answers,
        questions_of,
        read_benchmarks,
        require_no_fewer_rows,
        strange_answers,
        what_is_here,
        write_scores,
    )
    from grace_vlm.evals.tasks.registry import task_named
    from grace_vlm.evals.toy.suite import rows_of_toy_suite

    if asked.suite not in SUITES:
        raise ConfigError(f"--suite is {asked.suite}; expected one of {', '.join(SUITES)}")
    names = tuple(dict.fromkeys(task_named(name).about.name for name in asked.tasks)) or SUITES[asked.suite]
    profiles, part = known_profiles(asked.profiles), _part(asked.part)
    most = MOST_NEW_TOKENS if asked.max_new_tokens is None else asked.max_new_tokens
    benchmarks, absent = read_benchmarks(names, asked.data, asked.limit, bool(asked.tasks), most)
    if asked.control is not None:
        from grace_vlm.evals.suite.controls import controlled

        benchmarks = [controlled(one, asked.control) for one in benchmarks]
    if absent:
        say(f"{asked.data} has no {', '.join(absent)}; the others are evaluated")
    is_whole = asked.limit is None
    toy_rows = rows_of_toy_suite(asked.data)
    for one in benchmarks:
        if without := [profile for profile in profiles if profile not in one.known(profiles)]:
            known = ", ".join(one.task.about.profiles)
            say(f"{one.task.about.title} has no profile {', '.join(without)}; it has {known}")
        for reason, count in one.docs.skipped.items():
            say(f"{one.task.about.title}: {count} rows left out, {reason}")
        if is_whole and (said := what_is_here(one, toy_rows)) is not None:
            say(f"{said}; the score is of these")
    if not any(one.known(profiles) for one in benchmarks):
        raise ConfigError(f"none of the benchmarks has the profile {', '.join(profiles)}; choose another --profile")
    with FolderLock(asked.out / f".part{part.number + 1}"):
        ledger = Ledger(asked.out, _identity(asked, benchmarks, by), asked.resume, (part.number, part.of))
        if is_whole and (strange := strange_answers(benchmarks, ledger.replies)):
            asked_names = ", ".join(one.task.about.name for one in benchmarks)
            raise ConfigError(
                f"{asked.out} has answers to {strange} questions of {asked_names} that {asked.data} does not ask: its "
                "files are others now; pass another --out"
            )
        require_no_fewer_rows(asked.out, asked.limit)
        # Only where a question has no answer a model is opened.
        if not all(ledger.has(question.key) for question in questions_of(benchmarks, profiles, part)):
            with ProgressBar("answering") as bar:
                ask(benchmarks, profiles, _responder(asked, benchmarks, by), ledger, part, bar.update)
        if left := missing_answers(benchmarks, profiles, ledger.replies):
            say(
                f"{left} questions have not been asked: scores are written when all parts have ended, with the same "
                "--limit, --task and --profile"
            )
            return
        reports = write_scores(benchmarks, profiles, ledger.replies, asked.out, asked.limit)
    if as_json:
        emit_json(_summary(reports, asked.out, asked.control))
    else:
        _print(reports, asked.limit, asked.control)
        if asked.by is not None:
            _print_categories(reports, asked.by)
    failed = [reply.error or "" for reply in ledger.replies.values() if reply.text is None]
    if failed:
        raise RequestError(
            f"{len(failed)} of {len(ledger.replies)} questions have no answer and count as wrong, the first because "
            f"{failed[0]}; --resume asks them again"
        )


def known_profiles(names: Sequence[str]) -> list[Profile]:
    """The profiles of these names, in their own order; ``ConfigError`` for another name."""
    from grace_vlm.evals.tasks.task import PROFILES

    if wrong := [name for name in names if name not in PROFILES]:
        raise ConfigError(f"--profile is {wrong[0]}; expected one of {', '.join(PROFILES)}")
    return [profile for profile in PROFILES if profile in names]


def _part(text: str) -> Part:
    from grace_vlm.evals.suite.run import Part

    number, _, of = text.partition("/")
    wanted = "expected a number of so many, for example 2/4"
    if not (number.isdecimal() and of.isdecimal()):
        raise ConfigError(f"--part is {text}; {wanted}")
    if int(of) == 0:
        raise ConfigError(f"--part is {text}, of 0 parts; {wanted}")
    if not 1 <= int(number) <= int(of):
        raise ConfigError(f"--part is {text}, part {number} of {of}; parts of {of} have numbers from 1 to {of}")
    return Part(int(number) - 1, int(of))


def _identity(asked: Asked, benchmarks: Sequence[Benchmark], by: By) -> dict[str, Any]:
    """What answers of one folder have in common."""
    from grace_vlm.evals.suite.run import same_numbers, weights_digest

    model = asked.model
    stated: dict[str, Any] = {"model": model, "grace_vlm": __version__}
    if asked.max_new_tokens is not None:
        stated["max_new_tokens"] = asked.max_new_tokens
    if (control := benchmarks[0].control) is not None:
        stated["control"] = control.name
        if asked.control == "majority":
            return {**stated, "model": None, "by": "majority"}
    if by.endpoint is not None:
        return {**stated, "by": "endpoint", "endpoint": by.endpoint}
    stated["weights"] = weights_digest(model)
    if by.stock:
        return {**stated, "by": "transformers"}
    return {**stated, "by": "engine", "options": same_numbers(by.options)}


def _responder(asked: Asked, benchmarks: Sequence[Benchmark], by: By) -> Responder:
    from grace_vlm.evals.suite.responders import EndpointResponder, EngineResponder, TransformersResponder

    model = asked.model
    if asked.control == "majority":
        from grace_vlm.evals.suite.controls import MajorityResponder

        return MajorityResponder(benchmarks)
    if by.endpoint is not None:
        return EndpointResponder(by.endpoint, model, by.api_key, by.batch_size)
    if by.stock:
        from grace_vlm.models.load import load_model

        return TransformersResponder(load_model(model, by.device), by.batch_size)
    from grace_vlm.data.pictures import largest_area
    from grace_vlm.engine.llm import LLM
    from grace_vlm.engine.open import open_model

    loaded, codes = open_model(model, by.device)
    # The processor's own area on a CPU too: a score is the model's.
    return EngineResponder(LLM(loaded, options=by.options, quantized=codes, max_pixels=largest_area(loaded.processor)))


def _summary(reports: Mapping[Profile, Mapping[str, Report]], out: Path, control: str | None) -> dict[str, Any]:
    from grace_vlm.evals.suite.score import as_json

    scores = {profile: {name: as_json(one) for name, one in own.items()} for profile, own in reports.items()}
    return {"out": str(out), **({} if control is None else {"control": control}), "scores": scores}


def _print(reports: Mapping[Profile, Mapping[str, Report]], limit: int | None, control: str | None) -> None:
    from grace_vlm.evals.suite.score import said
    from grace_vlm.evals.tasks.registry import TASKS

    rows = []
    for profile, own in reports.items():
        for name, report in own.items():
            for metric, value in report.metrics.items():
                mark = "*" if metric == report.headline else ""
                unread = str(report.num_unparsed) if mark else ""
                label = "" if control is None else f" [control: {control}]"
                rows.append((f"{TASKS[name].about.title}{label}{mark}", profile, metric, said(value), unread))
    print_table(("benchmark", "profile", "metric", "value [95 % interval] scored/all", "unparsed"), rows)
    print("* the profile's own headline")
    if control is not None:
        print(f"of the control {control}: no score of a model, but what one is to be compared with")
    if limit is not None:
        print(f"of the first {limit} rows of each benchmark only (--limit)")


def _print_categories(reports: Mapping[Profile, Mapping[str, Report]], by: str) -> None:
    """Each profile's breakdown by a column."""
    from grace_vlm.evals.suite.categories import category_scores
    from grace_vlm.evals.suite.score import as_json, said
    from grace_vlm.evals.tasks.registry import TASKS
    from grace_vlm.evals.tasks.task import Metric

    rows = [
        (TASKS[one.task].about.title, profile, f"{one.column}: {one.value}", said(Metric(**one.metric)))
        for profile, own in reports.items()
        for one in category_scores({name: as_json(report) for name, report in own.items()}, by)
    ]
    print()
    print_table(("benchmark", "profile", "category", "value [95 % interval] scored/all"), rows)
