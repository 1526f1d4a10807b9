"""``grace generate``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, fail, say

HELP = """Answer every prompt of a file; requests run together, and an interrupted run goes on with --resume.

A line of the file: {"id": "a1", "prompt": "what is this?", "image": "cat.png", "max_tokens": 64}

Example: grace generate runs/demo/grace_w4 --data prompts.jsonl --out answers.jsonl"""


def generate(
    model: str = typer.Argument(..., help="Model folder, run folder, packed folder or hub id."),
    data: Path = typer.Option(..., "--data", help="Prompts, one JSON object a line."),
    out: Path = typer.Option(..., "--out", help="Answers, appended as they end, JSONL."),
    root: Path = typer.Option(None, "--root", help="Folder that image paths start from; default: the file's."),
    resume: bool = typer.Option(False, "--resume", help="Keep the answers that --out has, ask the rest."),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", help="Longest answer, tokens."),
    temperature: float = typer.Option(0.0, "--temperature", help="0 is greedy."),
    top_k: int = typer.Option(0, "--top-k", help="The so many likeliest tokens; 0 is all."),
    top_p: float = typer.Option(1.0, "--top-p", help="Tokens that make up so much probability."),
    seed: int = typer.Option(None, "--seed", help="The same seed, the same draws."),
    json_schema: Path = typer.Option(None, "--json-schema", help="File with a JSON schema that every answer follows."),
    batch_size: int = typer.Option(64, "--batch-size", help="Requests that run together."),
    cache_tokens: int = typer.Option(16_384, "--cache-tokens", help="Tokens of all of them that fit in memory."),
    kv_cache: str = typer.Option("model", "--kv-cache", help="model: its dtype; fp8: half of BF16's memory."),
    int8_head: bool = typer.Option(False, "--int8-head", help="Vocabulary in 8 bits: half of BF16's memory."),
    draft_tokens: int = typer.Option(
        0, "--draft-tokens", help="Tokens proposed from the prompt and run at once; 0: none."
    ),
    cpu_activations: str = typer.Option("int8", "--cpu-activations", help="int8, or fp32: exact, slower."),
    max_pixels: int = typer.Option(
        None, "--max-pixels", help="Area that larger pictures are shrunk to; default: the model's, 200704 on a CPU."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.engine.llm import LLM
    from grace_vlm.engine.prompt_file import (
        answer_line,
        explained,
        kept_answers,
        note_of,
        read_prompts,
        read_text,
        remaining,
        write_note,
    )
    from grace_vlm.engine.sampling import SamplingParams
    from grace_vlm.errors import CheckpointError, ConfigError, GraceError, RequestError
    from grace_vlm.evals.suite.run import weights_digest

    if out.exists() and data.exists() and out.samefile(data):
        raise ConfigError(f"--out and --data are one file, {out}; pass another --out")
    if out.exists() and not resume:
        raise CheckpointError(f"{out} already exists; choose another path or pass --resume to go on with it")
    schema = None if json_schema is None else read_text(json_schema)
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed=seed, json_schema=schema)
    start = root or data.parent
    asked = read_prompts(data, start, sampling)
    kept = {
        "kv_cache": kv_cache,
        "int8_head": int8_head,
        "cpu_activations": cpu_activations,
        "draft_tokens": draft_tokens,
    }
    options = EngineOptions(cache_tokens, batch_size, max(2048, batch_size + draft_tokens), **kept)  # type: ignore[arg-type]
    # Not the model's path: a folder that was moved is the same model.
    stated = {"weights": weights_digest(model), **kept, "max_pixels": max_pixels}
    done = kept_answers(out, asked, stated) & {one.id for one in asked}
    llm = LLM(model, device, options, max_pixels=max_pixels)
    if schema is not None:  # every prompt would be refused for one that nobody can follow
        try:
            llm.engine.guides.of_schema(schema)
        except RequestError as error:
            raise ConfigError(f"{json_schema}: {error}; pass a file with a JSON schema") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    was_there = out.exists()
    write_note(out, stated)
    count, failures = len(done), []
    with ProgressBar("answering") as bar, out.open("a", encoding="utf-8") as file:
        bar.update(count, len(asked))
        try:
            for one, answer in llm.answers(remaining(asked, done)):
                said = explained(one, answer, start) if isinstance(answer, RequestError) else answer
                file.write(answer_line(one, said))
                file.flush()
                failures += [str(said)] if isinstance(said, RequestError) else []  # an error itself keeps its pictures
                count += 1
                bar.update(count, len(asked))
        except KeyboardInterrupt:
            fail(f"interrupted; {count - len(failures)} answers kept in {out}, continue with --resume", 130)
        except GraceError:
            if not (was_there or count):  # nothing is left that would stand in a second try's way
                for left in (out, note_of(out)):
                    left.unlink()
            raise
    drafter = llm.engine.drafter
    if as_json:
        drafted = {"proposed": drafter.num_proposed, "accepted": drafter.num_accepted} if draft_tokens else {}
        emit_json({"out": str(out), "prompts": len(asked), "kept": len(done), "failed": len(failures), **drafted})
    else:
        say(f"{len(asked)} prompts, {len(done)} of them answered before, answers in {out}")
        if draft_tokens:
            say(f"{drafter.num_accepted} of {drafter.num_proposed} proposed tokens were accepted")
    if failures:
        raise RequestError(
            f"{len(failures)} of {len(asked)} prompts have no answer, the first because {failures[0]}; "
            f"{out} says why of each, --resume asks them again"
        )
