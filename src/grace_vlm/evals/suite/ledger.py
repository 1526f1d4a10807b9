"""Answers on a disk, one line each, written when they end: an evaluation that was killed goes on where it was.

    run.json                     what every answer is of: model, options, data; another one is refused
    answers.1-of-2.jsonl         of a part; one writer each
    {"key", "task", "doc", "text", "finish", "prompt", "pictures", "tokens", "seconds"}  or  {"key", ..., "error"}

Lines are only added. A question whose last line has an error is asked again; a line that a kill has torn is cut off.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from grace_vlm.checkpoint.atomic import make_folder, write_json_atomic
from grace_vlm.data.ledger import whole_lines
from grace_vlm.errors import CheckpointError, ConfigError, DataError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Reply:
    """What a model said to one question.

    Args:
        text: exactly as it came; None where there is none, and ``error`` says why.
        prompt: SHA-256 of the prompt's texts. pictures: of each picture's bytes.
        tokens: of the prompt and of the answer, where they are known. seconds: from when it was asked.
    """

    key: str
    task: str
    doc: str
    text: str | None
    finish: str | None = None
    error: str | None = None
    prompt: str = ""
    pictures: tuple[str, ...] = ()
    tokens: tuple[int, int] | None = None
    seconds: float = 0.0


class Ledger:
    """The answers of a folder.

    Args:
        identity: what must be the same for answers to belong together. resume: go on with what is there.

    Raises:
        CheckpointError: answers are there and ``resume`` is not asked for, or they are of another identity.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool, part: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        self.path = folder / f"answers.{part[0] + 1}-of-{part[1]}.jsonl"
        note = folder / "run.json"
        stated = {"format_version": FORMAT_VERSION, **identity}
        if note.is_file():
            _require_same(note, stated)
            if self.path.is_file() and self.path.stat().st_size and not resume:
                raise CheckpointError(
                    f"{self.path} already exists; choose another path or pass --resume to go on with it"
                )
        self._stated = stated
        if self.path.is_file():
            whole_lines(self.path)
        self.replies = read_replies(folder)

    def has(self, key: str) -> bool:
        """Whether a question has its answer."""
        return key in self.replies and self.replies[key].text is not None

    @contextlib.contextmanager
    def writing(self) -> Iterator[Ledger]:
        """``add`` works inside. ``run.json`` comes with it: a model that does not open leaves none."""
        make_folder(self.folder)
        if not (self.folder / "run.json").is_file():
            write_json_atomic(self.folder / "run.json", self._stated)
        with self.path.open("a", encoding="utf-8") as file:
            self._file: TextIO = file
            yield self

    def add(self, reply: Reply) -> None:
        """Keep one, now."""
        kept = {name: value for name, value in vars(reply).items() if value is not None}
        self._file.write(json.dumps(kept) + "\n")
        self._file.flush()
        self.replies[reply.key] = reply


def read_replies(folder: Path) -> dict[str, Reply]:
    """All answers of a folder by key, of all its parts; an answer outlives an error, whichever came first.

    Raises:
        DataError: a line that is none.
    """
    found: dict[str, Reply] = {}
    for path in sorted(folder.glob("answers.*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line or (number == len(lines) and not line.endswith("}")):
                continue  # another part's writer is at its last line
            try:
                content = json.loads(line)
                tokens = tuple(content["tokens"]) if "tokens" in content else None
                reply = Reply(
                    **{"text": None, **content, "pictures": tuple(content.get("pictures", ())), "tokens": tokens}
                )
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number} is no answer: {error}; remove the line") from None
            if reply.text is not None or reply.key not in found or found[reply.key].text is None:
                found[reply.key] = reply
    return found


def read_identity(folder: Path) -> dict[str, Any]:
    """``run.json`` of a folder of answers."""
    try:
        content: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no readable run.json ({error}); expected the --out of grace eval") from None
    return content


def _require_same(note: Path, stated: Mapping[str, Any]) -> None:
    before = read_identity(note.parent)
    wanted = json.loads(json.dumps(stated))
    changed = [
        f"{name} was {before.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted({*before, *wanted})
        if before.get(name) != wanted.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{note.parent} has answers of another evaluation ({'; '.join(changed)}); pass another --out"
        )
