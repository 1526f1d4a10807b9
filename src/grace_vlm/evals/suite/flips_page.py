"""``flips.jsonl``, ``flips.json`` and ``flips.html``: what turned, counted and shown with pictures."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grace_vlm.checkpoint.atomic import make_folder, write_bytes_atomic, write_json_atomic
from grace_vlm.errors import DataError
from grace_vlm.evals.charts import clipped, p_text
from grace_vlm.evals.plain_page import render_page
from grace_vlm.evals.suite.flips import Comparison, Flip
from grace_vlm.evals.suite.questions import Question, picture_bytes
from grace_vlm.evals.tasks.registry import TASKS
from grace_vlm.media.image import ImageFault
from grace_vlm.media.thumbnail import thumbnail

PAGE, LINES, COUNTS = "flips.html", "flips.jsonl", "flips.json"
MAX_SHOWN = 200
"""Rows on the page, so that it can be mailed; ``flips.jsonl`` has all."""


@dataclass(frozen=True)
class Shown:
    """A flip as the page has it. ``pictures``: data: URIs; ``no_picture``: why one is missing, or ""."""

    flip: Flip
    title: str
    prompt: str
    pictures: tuple[str, ...]
    no_picture: str


def write_flips(
    out: Path,
    comparison: Comparison,
    names: tuple[str, str],
    asked: Mapping[tuple[str, str], Question],
) -> Path:
    """Write all three; returns the page's path.

    Args:
        names: of the base and of what is compared with it. asked: questions of the flips, as ``asked_again`` has them;
            empty: neither prompts nor pictures.
    """
    make_folder(out)
    text = "".join(json.dumps(flip.line(), ensure_ascii=False, sort_keys=True) + "\n" for flip in comparison.flips)
    write_bytes_atomic(out / LINES, text.encode("utf-8", "surrogatepass"))
    differences = [
        {**asdict(one), "holm": p} for one, p in zip(comparison.differences, comparison.adjusted, strict=True)
    ]
    content = {
        "format_version": 1,
        "base": names[0],
        "own": names[1],
        "profile": comparison.profile,
        "differences": differences,
        "counts": [asdict(count) for count in comparison.counts],
    }
    write_json_atomic(out / COUNTS, content)
    shown = [_shown(flip, asked.get((flip.task, flip.id))) for flip in chosen(comparison.flips)]
    page = render_page(
        "suite/flips.html.jinja",
        base=names[0],
        own=names[1],
        comparison=comparison,
        shown=shown,
        titles={name: task.about.title for name, task in TASKS.items()},
        has_prompts=bool(asked),
        p_text=p_text,
        clipped=clipped,
    )
    write_bytes_atomic(out / PAGE, page)
    return out / PAGE


def chosen(flips: Sequence[Flip], limit: int = MAX_SHOWN) -> list[Flip]:
    """Those that are shown: all, or ``limit`` of them, tasks and turns in turns, each in the order of its rows."""
    if len(flips) <= limit:
        return list(flips)
    kinds: dict[tuple[str, str], list[Flip]] = {}
    for flip in flips:
        kinds.setdefault((flip.task, flip.turn), []).append(flip)
    rounds = itertools.zip_longest(*kinds.values())
    picked = [flip for each in rounds for flip in each if flip is not None][:limit]
    kept = {(flip.task, flip.id) for flip in picked}
    return [flip for flip in flips if (flip.task, flip.id) in kept]


def _shown(flip: Flip, question: Question | None) -> Shown:
    title = TASKS[flip.task].about.title
    prompt = flip.prompt if flip.prompt is not None else _options(flip)
    if question is None:
        return Shown(flip, title, prompt, (), "")
    try:
        pictures = list(_uris(question, flip.pictures))
    except DataError as error:
        return Shown(flip, title, prompt, (), f"picture left out: {error}")
    except ImageFault as fault:
        return Shown(flip, title, prompt, (), f"picture left out: {fault.reason}")
    return Shown(flip, title, prompt, tuple(pictures), "")


def _uris(question: Question, hashes: Sequence[str]) -> Iterator[str]:
    """Each picture as a data: URI of a small PNG; a ``DataError`` for one that is not what was asked about."""
    for number, data in enumerate(picture_bytes(question)):
        if number < len(hashes) and hashlib.sha256(data).hexdigest() != hashes[number]:
            raise DataError("the file has another one now than was asked about")
        yield f"data:image/png;base64,{base64.b64encode(thumbnail(data)).decode('ascii')}"


def _options(flip: Flip) -> str:
    """The question with its options, where the prompt is not known."""
    return "\n".join([flip.question, *(f"{letter}. {text}" for letter, text in flip.options.items())])
