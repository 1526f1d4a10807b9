"""``grace eval``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table

HELP = """Ask a model every question of a file and score its answers.

Example: grace eval runs/demo/grace_w4 --data runs/demo/data/test.jsonl"""


def evaluate(
    model: str = typer.Argument(..., help="Model folder, run folder, packed folder or hub id."),
    data: Path = typer.Option(..., "--data", help="Rows with one question each; the last answer is the gold one."),
    root: Path = typer.Option(None, "--root", help="Folder that image paths start from; default: the file's."),
    limit: int = typer.Option(None, "--limit", help="Only the first N rows."),
    answers: Path = typer.Option(None, "--answers", help="Where to write every answer, JSONL."),
    batch_size: int = typer.Option(64, "--batch-size", help="Questions of one forward."),
    max_new_tokens: int = typer.Option(16, "--max-new-tokens", help="Longest answer, tokens."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.evals.run import QuestionFile, answer_all, score, write_answers
    from grace_vlm.models.load import load_model

    loaded = load_model(model, device)
    with ProgressBar("answering") as bar:
        questions = QuestionFile(data, loaded, root, limit)
        found = answer_all(loaded, questions, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=bar.update)
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
