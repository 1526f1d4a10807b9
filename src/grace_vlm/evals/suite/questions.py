"""What is asked: every distinct prompt of a task once, whichever profiles share it.

A question's key is a hash of the benchmark's files, the row, the prompt's texts with the places of its pictures, and
the longest answer. So two profiles that ask alike share an answer, and every parser reads the same reply.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from grace_vlm.evals.tasks.task import Doc, Docs, Part, Picture, Profile, Task

MOST_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    """One prompt of one row.

    Args:
        parts: texts and pictures in order. max_new_tokens: of the answer.
    """

    key: str
    task: str
    doc_id: str
    parts: tuple[Part, ...]
    max_new_tokens: int

    @property
    def text(self) -> str:
        """The prompt as a person reads it: a picture is ``[picture]``."""
        return "".join(part if isinstance(part, str) else "[picture]" for part in self.parts)


class Control(Protocol):
    """Another way of asking, to compare with (``controls.py``). ``name`` is a part of every key."""

    @property
    def name(self) -> str: ...

    def parts(self, doc: Doc, parts: tuple[Part, ...]) -> tuple[Part, ...]: ...


@dataclass(frozen=True)
class Benchmark:
    """A task with its rows. ``data``: a hash of the files that they are from. ``most_new_tokens``: no answer is longer,
    whatever a profile allows (VLMEvalKit allows 16,384). ``control``: None where the benchmark itself is asked."""

    task: Task
    docs: Docs
    data: str
    most_new_tokens: int = MOST_NEW_TOKENS
    control: Control | None = None
    _asked: dict[tuple[str, Profile], Question] = field(default_factory=dict, init=False, repr=False, compare=False)

    def question(self, doc: Doc, profile: Profile) -> Question:
        """What a row asks under a profile; made once, since asking and scoring both need it."""
        place = doc.id, profile
        if place not in self._asked:
            self._asked[place] = self._question(doc, profile)
        return self._asked[place]

    def _question(self, doc: Doc, profile: Profile) -> Question:
        parts = self.task.prompt(doc, profile)
        if self.control is not None:
            parts = self.control.parts(doc, parts)
        budget = min(self.task.max_new_tokens(doc, profile), self.most_new_tokens)
        marked = [part if isinstance(part, str) else {"picture": part.column} for part in parts]
        name = self.task.about.name
        controlled = [] if self.control is None else [f"control {self.control.name}"]
        content = json.dumps([name, self.data, doc.id, marked, budget, *controlled], ensure_ascii=False)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return Question(key, name, doc.id, parts, budget)

    def known(self, profiles: Sequence[Profile]) -> list[Profile]:
        """Those of ``profiles`` that the task has: not every program scores every benchmark without a judge."""
        return [profile for profile in profiles if profile in self.task.about.profiles]

    def questions(self, profiles: Sequence[Profile]) -> list[Question]:
        """Every distinct one of the profiles that the task has, in the order of the rows."""
        found: dict[str, Question] = {}
        for doc in self.docs:
            for profile in self.known(profiles):
                question = self.question(doc, profile)
                found.setdefault(question.key, question)
        return list(found.values())


def digest_of(source: Path) -> str:
    """Of a benchmark's files: names and sizes, and of small ones every byte. Pictures that are files are known by their
    sizes; each one's bytes are hashed when it is asked about."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.relative_to(source.parent)} {size}\n".encode("utf-8", "surrogateescape"))
        if size < 1 << 20 and path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def text_hash(question: Question) -> str:
    """SHA-256 of the prompt's texts, as answers and records keep it."""
    return hashlib.sha256(question.text.encode("utf-8", "surrogatepass")).hexdigest()


def in_shard(question: Question, shard: int, num_shards: int) -> bool:
    """Whether a question is of part ``shard`` (from 0) of ``num_shards``: by its key, on any machine alike."""
    return int(question.key[:8], 16) % num_shards == shard


def picture_bytes(question: Question) -> list[bytes]:
    """Of its pictures, undecoded, in order; ``DataError`` where one cannot be had."""
    return [part.load() for part in question.parts if isinstance(part, Picture)]
