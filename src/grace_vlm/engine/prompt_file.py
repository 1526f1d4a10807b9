"""Prompts in a file, answers in another: one a line, in any order, and an interrupted run goes on.

A line of prompts is an object::

    {"id": "a1",                        any text, unlike the others'; the line's number if it is left out
     "prompt": "what is this?",         or a conversation: ["what is this?", "a cat", "and its colour?"]
     "image": "cat.png",                or a list of paths; relative ones start at the file's folder
     "max_tokens": 64, ...}             any of SamplingParams; what is left out is as the command says

A line of answers has ``id``, ``asked`` (a hash of prompt, names of pictures and sampling), ``text``, ``finish``,
``prompt_tokens`` and ``answer_tokens``, or ``id`` and ``error``. It is appended when the answer has ended. A run that
goes on keeps the lines with a text, and asks the rest again. What all answers have in common, the model's weights and
the engine's options, stands beside them in ``<answers>.run.json``; a run that differs in either does not go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.atomic import write_bytes_atomic, write_json_atomic
from grace_vlm.engine.llm import Answer, Asked
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import CheckpointError, DataError, RequestError

FORMAT_VERSION = 1
_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
_KNOWN = {"id", "prompt", "image", *_FIELDS}


def read_prompts(path: Path, root: Path, defaults: SamplingParams) -> list[Asked]:
    """All requests of a file.

    Raises:
        DataError: the first line that is none, or whose id an earlier one has: nothing was asked yet.
    """
    # Not splitlines: U+2028 and others may stand in JSON as they are.
    lines = read_text(path).split("\n")
    found: dict[str, Asked] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            one = _asked(line, number, root, defaults)
        except (ValueError, RequestError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        if one.id in found:
            raise DataError(f"{path}, line {number}: id {one.id!r} is an earlier line's too; give each its own")
        found[one.id] = one
    return list(found.values())


def read_text(path: Path) -> str:
    """A file in UTF-8; ``DataError`` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {str(error.strerror).lower()}; expected a file in UTF-8") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}; expected a file in UTF-8") from None


def _asked(line: str, number: int, root: Path, defaults: SamplingParams) -> Asked:
    example = '{"prompt": "what is this?", "image": "cat.png"}'
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error}); expected an object like {example}") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is no object; expected one like {example}")
    if unknown := sorted(set(row) - _KNOWN):
        raise ValueError(f"unknown key {unknown[0]!r}; expected some of {', '.join(sorted(_KNOWN))}")
    prompt, image = row.get("prompt"), row.get("image")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("prompt is no text; expected a text, or a list of texts")
    images = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise ValueError("image is no path; expected a path, or a list of paths")
    given = {name: row[name] for name in row if name in _FIELDS}
    sampling = dataclasses.replace(defaults, **given)
    return Asked(str(row.get("id", number)), texts, [root / one for one in images], sampling)


def explained(one: Asked, error: RequestError, root: Path) -> RequestError:
    """The error of a request with what helps where one of its pictures is not there: from where paths start."""
    if not any(isinstance(image, Path) and image.is_relative_to(root) and not image.exists() for image in one.images):
        return error
    return RequestError(f"{error}; image paths start from the folder {root}, --root names another")


def note_of(out: Path) -> Path:
    """Where it stands what the answers of a file have in common."""
    return out.with_name(f"{out.name}.run.json")


def write_note(out: Path, stated: Mapping[str, Any]) -> None:
    """Beside a file of answers; ``stated``: model and options, as JSON has them."""
    write_json_atomic(note_of(out), {"format_version": FORMAT_VERSION, **stated})


def _require_same_run(out: Path, stated: Mapping[str, Any]) -> None:
    """``CheckpointError``: the answers are of another model or other options, or nothing says of which."""
    note = note_of(out)
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{out} has answers, and no readable {note.name} says of which model; pass another --out"
        ) from None
    now = json.loads(json.dumps({"format_version": FORMAT_VERSION, **stated}))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"{out} has answers of another run: {name} was {before.get(name)!r}, now {now.get(name)!r}; pass "
                "another --out"
            )


def asked_hash(one: Asked) -> str:
    """Of what is asked: texts, names of the pictures, sampling."""
    content = [one.prompt, [str(image) for image in one.images], dataclasses.asdict(one.sampling)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def kept_answers(out: Path, asked: Sequence[Asked], stated: Mapping[str, Any]) -> set[str]:
    """Ids that have a text in a file of an interrupted run; the file then holds these lines alone.

    Raises:
        DataError: the file is none of answers.
        CheckpointError: its answers are of another run than ``stated`` says, or one is to another prompt, other
            pictures or other sampling than its id has in ``asked``. It stays as it is.
    """
    if not out.exists():
        return set()
    hashes = {one.id: asked_hash(one) for one in asked}
    kept: dict[str, bytes] = {}
    lines = [line for line in out.read_bytes().split(b"\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break  # it was being written
            row = None
        if not isinstance(row, dict) or "id" not in row or not ("text" in row or "error" in row):
            raise DataError(
                f"{out}, line {number}, is no answer; --resume goes on with a file of answers: pass another --out"
            )
        if "text" in row:
            if hashes.get(str(row["id"]), row.get("asked")) != row.get("asked"):
                raise CheckpointError(
                    f"{out}, line {number}, answers another prompt, picture or sampling than {str(row['id'])!r} has "
                    "now; pass another --out"
                )
            kept[str(row["id"])] = line + b"\n"
    if lines:
        _require_same_run(out, stated)
    write_bytes_atomic(out, b"".join(kept.values()))
    return set(kept)


def answer_line(one: Asked, answer: Answer | RequestError) -> str:
    """A line of the file of answers."""
    if isinstance(answer, RequestError):
        return json.dumps({"id": one.id, "error": str(answer)}, ensure_ascii=False) + "\n"
    row: dict[str, Any] = {
        "id": one.id,
        "asked": asked_hash(one),
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.num_prompt_tokens,
        "answer_tokens": len(answer.token_ids),
    }
    if one.sampling.logprobs is not None:
        row["tokens"] = [[choice.token, choice.logprob, choice.top_logprobs] for choice in answer.choices]
    return json.dumps(row, ensure_ascii=False) + "\n"


def remaining(asked: list[Asked], done: set[str]) -> Iterator[Asked]:
    """Those that are not done."""
    return (one for one in asked if one.id not in done)
