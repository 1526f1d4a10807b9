"""``grace scores``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from grace_vlm.cli.output import emit_json
from grace_vlm.cli.suite import known_profiles
from grace_vlm.errors import ConfigError

if TYPE_CHECKING:
    from grace_vlm.evals.suite.tables import Line
    from grace_vlm.evals.tasks.task import Profile

HELP = """The table of several evaluations by grace eval --suite, and what one lost against another.

Example: grace scores bf16=runs/eval-bf16 w4=runs/eval-w4 --reference teacher=runs/eval-8b --baseline bf16"""


def scores(
    runs: list[str] = typer.Argument(..., help="Folders of grace eval --suite, each as NAME=FOLDER or FOLDER."),
    reference: list[str] = typer.Option(
        [], "--reference", help="One that is shown and not compared, such as a teacher."
    ),
    profiles: list[str] = typer.Option(["strict"], "--profile", help="Whose prompts, parsers and aggregates."),
    form: str = typer.Option("markdown", "--format", help="markdown, latex, csv or html."),
    baseline: str = typer.Option(
        None, "--baseline", help="NAME of the one that others are compared with, row by row; as csv alone."
    ),
    by: str = typer.Option(
        None, "--by", help="Also by category: each benchmark's own (category), a column by name, or all; as csv alone."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.evals.suite.tables import category_table, difference_table, read_line, table

    profile = one_profile(profiles)
    if form == "csv" and by is not None and baseline is not None:
        raise ConfigError("--by and --baseline are a csv each; leave one out, or take another --format")
    named, shown = [_named(run) for run in runs], [_named(run) for run in reference]
    _require_own_names([*named, *shown])
    lines = [read_line(folder, label, profile, by=by) for label, folder in named]
    lines += [read_line(folder, label, profile, is_reference=True, by=by) for label, folder in shown]
    said = {label: line.label for (label, _), line in zip(named, lines, strict=False)}
    compared = {} if baseline is None else _compared(named, baseline, profile)
    if as_json:
        from dataclasses import asdict

        documents = [{**asdict(line), "categories": _categories(line)} for line in lines]
        emit_json({"profile": profile, "rows": documents, "differences": compared})
        return
    if form != "csv" or (by is None and baseline is None):  # one file has one table
        print(table(lines, profile, form), end="" if by is None else "\n")
    if by is not None:
        print(category_table(lines, profile, form), end="")
    if compared:
        found = {said[label]: own for label, own in compared.items()}
        print(("" if form == "csv" else "\n") + difference_table(found, said[baseline], profile, form), end="")


def one_profile(given: Sequence[str]) -> Profile:
    """The profile of a table; ``ConfigError`` for another name, or several."""
    if len(given) > 1:
        raise ConfigError(f"--profile is given {len(given)} times ({', '.join(given)}); numbers of one stand together")
    return known_profiles(given)[0]


def _categories(line: Line) -> list[dict[str, Any]]:
    """Of one model, an object each: JSON has no keys of three parts."""
    from dataclasses import asdict

    return [
        {"task": task, "column": column, "category": value, **asdict(cell)}
        for (task, column, value), cell in line.categories.items()
    ]


def _named(text: str) -> tuple[str, Path]:
    label, equals, folder = text.partition("=")
    return (label, Path(folder)) if equals else (Path(text).name, Path(text))


def _require_own_names(runs: list[tuple[str, Path]]) -> None:
    """``ConfigError`` for two runs of one name."""
    for label, _ in runs:
        if len(same := [str(folder) for other, folder in runs if other == label]) > 1:
            raise ConfigError(f"{len(same)} runs are named {label} ({', '.join(same)}); give each its own, NAME=FOLDER")


def _compared(named: list[tuple[str, Path]], baseline: str, profile: str) -> dict[str, list[dict[str, Any]]]:
    """Differences of every other evaluation to the baseline, by name."""
    from dataclasses import asdict

    from grace_vlm.evals.statistics import holm
    from grace_vlm.evals.suite.paired import difference, read_records, require_same_data

    folders = dict(named)
    if len(folders) < 2:
        raise ConfigError("--baseline compares several runs and one was given; give another as NAME=FOLDER")
    if baseline not in folders:
        raise ConfigError(f"--baseline is {baseline}; expected one of {', '.join(folders)}")
    base = read_records(folders[baseline], profile)
    found = {}
    for label, folder in named:
        if label == baseline:
            continue
        own = read_records(folder, profile)
        require_same_data(folder, folders[baseline], [task for task in base if task in own])
        each = [difference(task, own[task], base[task]) for task in base if task in own]
        adjusted = holm([one.p_value for one in each])
        found[label] = [{**asdict(one), "holm": p} for one, p in zip(each, adjusted, strict=True)]
    return found
