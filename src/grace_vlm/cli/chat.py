"""``grace chat``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import emit_json

HELP = """Ask a model one question about one picture.

Example: grace chat runs/demo/grace_w4 --image cat.png --question "what is this?" """


def chat(
    model: str = typer.Argument(..., help="Model folder, run folder, packed folder or hub id."),
    image: Path = typer.Option(None, "--image", help="PNG, JPEG, WEBP or GIF; leave out for text only."),
    question: str = typer.Option(..., "--question", help="What to ask."),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", help="Longest answer, tokens."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.evals.ask import ask
    from grace_vlm.models.load import load_model

    answer = ask(load_model(model, device), question, image, max_new_tokens)
    if as_json:
        emit_json({"model": model, "question": question, "answer": answer})
    else:
        print(answer)
