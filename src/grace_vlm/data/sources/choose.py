"""A fixed part of a prepared split to be asked: the first questions of easy-VQA and the first of the scenes.

easy-VQA saturates (a small model answers all of it), so a comparison needs it for little and the scenes for the rest.
"""

from __future__ import annotations

import json
from pathlib import Path


def choose_questions(rows: Path, num_easy: int, num_scenes: int) -> bytes:
    """The first ``num_easy`` easy-VQA rows and the first ``num_scenes`` others of ``rows``, as a file's content."""
    easy: list[str] = []
    scenes: list[str] = []
    for line in rows.read_text(encoding="utf-8").splitlines(keepends=True):
        (easy if json.loads(line)["kind"].startswith("easy_") else scenes).append(line)
    return "".join(easy[:num_easy] + scenes[:num_scenes]).encode()
