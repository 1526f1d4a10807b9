"""JSON from a disk, read as strictly as it was written.

Python's own reader takes ``NaN``, lets the last of two equal keys win, and follows nesting until the stack ends. A
file that decides what a run resumes from may do none of that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grace_vlm.errors import CheckpointError, GraceError

MAX_BYTES = 64 << 20
"""Far above any configuration, index or resume state; below what would hurt."""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def read_object(path: Path, error: type[GraceError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in ``path``; anything else is one line of ``error``."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        found = json.loads(
            path.read_bytes().decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_refuse_duplicates,
        )
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}; expected a JSON file") from reason
    except RecursionError as reason:
        raise error(f"{path} is no usable JSON: nested too deeply") from reason
    except ValueError as reason:
        raise error(f"{path} is no usable JSON: {reason}") from reason
    if not isinstance(found, dict):
        raise error(f"{path} holds a JSON {type(found).__name__}; expected an object")
    return found
