"""``grace chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from grace_vlm.cli.output import emit_json, fail, say
from grace_vlm.errors import RequestError

if TYPE_CHECKING:
    from grace_vlm.engine.llm import LLM
    from grace_vlm.engine.sampling import SamplingParams

HELP = """Talk with a model about pictures. With --question it answers once; without, in turns until the end of input.

In turns, /image PATH shows it a picture with the next text, /new begins anew, /quit ends.

Example: grace chat runs/demo/grace_w4 --image cat.png --question "what is this?" """


def chat(
    model: str = typer.Argument(..., help="Model folder, run folder, packed folder or hub id."),
    image: list[Path] = typer.Option([], "--image", help="PNG, JPEG, WEBP or GIF; again for more of them."),
    question: str = typer.Option(None, "--question", help="What to ask; leave out to talk in turns."),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", help="Longest answer, tokens."),
    temperature: float = typer.Option(0.0, "--temperature", help="0 is greedy."),
    top_p: float = typer.Option(1.0, "--top-p", help="Tokens that make up so much probability."),
    seed: int = typer.Option(None, "--seed", help="The same seed, the same draws."),
    cache_tokens: int = typer.Option(8192, "--cache-tokens", help="Longest conversation and answer, tokens."),
    kv_cache: str = typer.Option("model", "--kv-cache", help="model: its dtype; fp8: half of BF16's memory."),
    int8_head: bool = typer.Option(False, "--int8-head", help="Vocabulary in 8 bits: half of BF16's memory."),
    cpu_activations: str = typer.Option("int8", "--cpu-activations", help="int8, or fp32: exact, slower."),
    max_pixels: int = typer.Option(
        None, "--max-pixels", help="Area that larger pictures are shrunk to; default: the model's, 200704 on a CPU."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output; needs --question."),
) -> None:
    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.engine.llm import LLM
    from grace_vlm.engine.sampling import SamplingParams

    if as_json and question is None:
        raise RequestError("--json is for one answer; pass --question TEXT too")
    if question is not None and not question.strip():
        raise RequestError("the question is empty; pass --question TEXT")
    sampling = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    kept = {"kv_cache": kv_cache, "int8_head": int8_head, "cpu_activations": cpu_activations}
    options = EngineOptions(cache_tokens, max_running=1, **kept)  # type: ignore[arg-type]
    llm = LLM(model, device, options, max_pixels=max_pixels)
    if question is None:
        _talk(llm, list(image), sampling)
    elif as_json:
        answer = llm.generate(question, list(image), sampling)[0]
        emit_json({"model": model, "question": question, "answer": answer.text, "finish": answer.finish})
    else:
        _print(llm.stream(question, list(image), sampling))


def _print(pieces: Iterator[str]) -> str:
    """Write an answer as it comes; the whole of it."""
    whole = ""
    try:
        for piece in pieces:
            whole += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # enough of this answer
        if not sys.stdin.isatty():
            raise
    print()
    return whole


def _talk(llm: LLM, images: list[Path], sampling: SamplingParams) -> None:
    """Turns from standard input. What cannot be asked is said, and the conversation goes on without it."""
    from grace_vlm.data.rows import IMAGE_MARKER

    is_person = sys.stdin.isatty()
    texts: list[str] = []
    shown: list[Path] = []
    if is_person:
        say("/image PATH shows a picture with your next text, /new begins anew, /quit ends")
    while True:
        try:
            line = input("> " if is_person else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            texts, shown, images = [], [], []
        elif line.startswith("/image "):
            picture = Path(line.removeprefix("/image ").strip())
            if picture.is_file() or not is_person:  # a script's mistake ends it, with the question it belongs to
                images.append(picture)
            else:
                say(f"{picture} is no file; no picture was added")
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command; there are /image PATH, /new and /quit")
        elif line:
            text = f"{IMAGE_MARKER}\n" * len(images) + line.replace(IMAGE_MARKER, " ")
            try:
                answer = _print(llm.stream([*texts, text], [*shown, *images], sampling))
            except RequestError as error:
                if not is_person:
                    fail(str(error), error.exit_code)
                say(f"error: {error}")
                images = []
                continue
            # What the model said is given to it again as words: never as a picture, never as nothing.
            said = answer.replace(IMAGE_MARKER, " ").strip() or "-"
            texts, shown, images = [*texts, text, said], [*shown, *images], []
