"""``grace eval``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table, say
from grace_vlm.cli.suite import Asked, By, run_suite
from grace_vlm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from grace_vlm.engine.engine import EngineOptions

HELP = """Ask a model questions and score its answers: those of a file, or a suite of public benchmarks.

Example: grace eval runs/demo/grace_w4 --data runs/demo/data/test.jsonl
Example: grace eval MODEL --suite card --data benchmarks/ --out runs/eval --profile strict --profile card"""


def evaluate(
    model: str = typer.Argument(..., help="Model folder, run folder, packed folder or hub id."),
    data: Path = typer.Option(
        ...,
        "--data",
        help="Rows of one question each, the last answer is the gold one; with --suite the benchmarks' folder, or hub.",
    ),
    suite: str = typer.Option(None, "--suite", help="card (the seven of the model card) or all; needs --out."),
    task: list[str] = typer.Option([], "--task", help="Of the suite only this one; again for more of them."),
    profile: list[str] = typer.Option(["strict"], "--profile", help="strict, card, lmms, kit; again for more of them."),
    out: Path = typer.Option(None, "--out", help="Folder of every answer, record and score of a suite."),
    resume: bool = typer.Option(False, "--resume", help="Keep the answers that --out has, ask the rest."),
    part: str = typer.Option("1/1", "--part", help="Of the suite's questions only this part, as 2/4."),
    by: str = typer.Option(
        None, "--by", help="Of a suite also by category: each benchmark's own (category), a column's name, or all."
    ),
    control: str = typer.Option(
        None,
        "--control",
        help="No score but what to compare one with: blind, shuffle (pictures) or majority (no model).",
    ),
    endpoint: str = typer.Option(
        None, "--endpoint", help="URL of a server (up to /v1) that answers; MODEL is its name."
    ),
    api_key: str = typer.Option(None, "--api-key", envvar="OPENAI_API_KEY", help="For --endpoint."),
    stock: bool = typer.Option(False, "--transformers", help="By Transformers' generate instead of the engine."),
    root: Path = typer.Option(None, "--root", help="Folder that image paths start from; default: the file's."),
    limit: int = typer.Option(
        None, "--limit", min=1, help="Only the first N rows of the file as they stand, or of each benchmark."
    ),
    answers: Path = typer.Option(None, "--answers", help="Where to write every answer of a file, JSONL."),
    batch_size: int = typer.Option(64, "--batch-size", min=1, help="Questions that run together."),
    cache_tokens: int = typer.Option(16_384, "--cache-tokens", help="Tokens of them all that fit in memory."),
    batch_invariant: bool = typer.Option(False, "--batch-invariant", help="Answers do not hang on --batch-size."),
    max_new_tokens: int = typer.Option(
        None, "--max-new-tokens", min=1, help="Longest answer; default: 16, of a suite the profile's up to 1024."
    ),
    cpu_activations: str = typer.Option("fp32", "--cpu-activations", help="fp32: exact; int8: faster, rounded."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.evals.run import MAX_NEW_TOKENS

    sizes = {"max_running": batch_size, "max_step_tokens": max(2048, batch_size), "cache_tokens": cache_tokens}
    kinds = {"batch_invariant": batch_invariant, "cpu_activations": cpu_activations}
    options = EngineOptions(**sizes, **kinds)  # type: ignore[arg-type]
    if suite is None:
        if wrong := [
            name
            for name, value in (
                ("--out", out),
                ("--endpoint", endpoint),
                ("--task", task),
                ("--by", by),
                ("--control", control),
                ("--profile", profile != ["strict"]),
                ("--part", part != "1/1"),
                ("--resume", resume),
                ("--transformers", stock),
            )
            if value
        ]:
            raise ConfigError(f"{wrong[0]} is for a suite; pass --suite card, or leave it out")
        _require_rows(data)
        _file(model, data, root, limit, answers, max_new_tokens or MAX_NEW_TOKENS, options, device, as_json)
        return
    if out is None:
        raise ConfigError("--suite needs --out, the folder that answers and scores go to")
    asked = Asked(
        model, data, suite, tuple(task), tuple(profile), out, resume, part, limit, max_new_tokens, by, control
    )
    run_suite(asked, By(endpoint, api_key, stock, batch_size, device, options), as_json)


def _require_rows(data: Path) -> None:
    """``ConfigError`` for a folder, which only a suite is asked of."""
    if not data.is_dir():
        return
    from grace_vlm.evals.tasks.registry import TASKS

    if found := [name for name in TASKS if (data / name).is_dir()]:
        raise ConfigError(
            f"--data is {data}, a folder of benchmarks ({', '.join(found)}); pass --suite card and --out to ask them"
        )
    raise ConfigError(f"--data is {data}, a folder; expected a file of rows, or with --suite a folder of benchmarks")


def _file(
    model: str,
    data: Path,
    root: Path | None,
    limit: int | None,
    answers: Path | None,
    max_new_tokens: int,
    options: EngineOptions,
    device: str,
    as_json: bool,
) -> None:
    """Questions of one file in the rows of training."""
    from grace_vlm.engine.open import open_model
    from grace_vlm.evals.run import QuestionFile, answer_all, open_engine, score, write_answers

    if answers is not None and answers.exists():
        raise CheckpointError(f"{answers} already exists; choose another path for --answers")
    loaded, codes = open_model(model, device)
    with ProgressBar("answering") as bar:
        questions = QuestionFile(data, loaded, root, limit)
        if left_out := questions.kinds_left_out():
            say(
                f"the first {questions.num_total} rows (--limit) have none of the kinds {', '.join(left_out)}, which "
                f"{data} has further on"
            )
        engine = open_engine(loaded, codes, questions, options, max_new_tokens)
        found = answer_all(engine, questions, max_new_tokens=max_new_tokens, progress=bar.update)
    result = score(found, questions.num_total)
    if answers is not None:
        write_answers(answers, found)
    if as_json:
        emit_json({"model": model, "data": str(data), **asdict(result)})
        return
    rows = [(kind or "-", str(n), f"{100 * c / n:.1f}") for kind, (c, n) in result.kinds.items()]
    print_table(("kind", "questions", "accuracy %"), rows)
    interval = f"[{100 * result.low:.1f}, {100 * result.high:.1f}]"
    print(f"accuracy {100 * result.accuracy:.2f} % {interval} on {result.num_scored} of {result.num_total} rows")
