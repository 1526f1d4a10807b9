"""``grace perplexity``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import ProgressBar, emit_json

HELP = """What a model has left of the language: perplexity of a text, and how far its words are from another model's.

Example: grace perplexity runs/grace_w4 text.txt --reference runs/bf16"""


def perplexity(
    model: str = typer.Argument(..., help="Model folder, run folder, packed folder or hub id."),
    text: Path = typer.Argument(..., help="Plain English, say, as UTF-8: none that the model was trained on."),
    reference: str = typer.Option(None, "--reference", help="Also KL to this model and how often both agree."),
    window: int = typer.Option(2048, "--window", min=2, help="Tokens of a window; the first is not predicted."),
    limit: int = typer.Option(None, "--limit", min=1, help="Only the first N windows."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.engine.open import open_model
    from grace_vlm.evals.perplexity import read_windows, score_text
    from grace_vlm.models.tokenizers import require_same_tokens

    loaded, _ = open_model(model, device)
    other = None if reference is None else open_model(reference, device)[0]
    if other is not None:
        require_same_tokens(loaded.processor.tokenizer, other.processor.tokenizer)
    windows = read_windows(text, loaded.processor.tokenizer, window, limit)
    with ProgressBar("reading") as bar:
        found = score_text(loaded, windows, other, bar.update)
    low, high = found.interval
    if as_json:
        emit_json(
            {
                "model": model,
                "text": str(text),
                "reference": reference,
                "num_windows": len(windows),
                "num_tokens": found.num_tokens,
                "perplexity": found.perplexity,
                "interval": None if len(windows) < 2 else [low, high],
                "losses": found.losses,
                "divergence": found.divergence,
                "agreement": found.agreement,
            }
        )
        return
    spread = "" if len(windows) < 2 else f" [{low:.3f}, {high:.3f}]"
    print(f"perplexity {found.perplexity:.3f}{spread} on {found.num_tokens:,} tokens of {len(windows)} windows")
    if found.agreement is not None:
        print(f"KL to {reference} {found.divergence:.4f} nats a token, same likeliest word {found.agreement:.2%}")
