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
    limit: int = typer.Option(None, "--limit", min=1, help="Only the first N rows."),
    answers: Path = typer.Option(None, "--answers", help="Where to write every answer, JSONL."),
    batch_size: int = typer.Option(64, "--batch-size", min=1, help="Questions that run together."),
    max_new_tokens: int = typer.Option(16, "--max-new-tokens", min=1, help="Longest answer, tokens."),
    cpu_activations: str = typer.Option("fp32", "--cpu-activations", help="fp32: exact; int8: faster, rounded."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.engine.open import open_model
    from grace_vlm.evals.run import QuestionFile, answer_all, open_engine, score, write_answers

    sizes = {"max_running": batch_size, "max_step_tokens": max(2048, batch_size)}
    options = EngineOptions(**sizes, cpu_activations=cpu_activations)  # type: ignore[arg-type]
    loaded, codes = open_model(model, device)
    with ProgressBar("answering") as bar:
        questions = QuestionFile(data, loaded, root, limit)
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
