"""JSON from a disk, read as strictly as it was written.

Python's own reader takes ``NaN``, 1e999 as infinity and half a surrogate pair, lets the last of two equal keys win,
and follows nesting until the stack ends, or leaves that to whoever prints or writes the result. A file that decides
what a run resumes from may do none of that.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from grace_vlm.errors import CheckpointError, GraceError

MAX_BYTES = 64 << 20
"""Far above any configuration, index or resume state; below what would hurt."""
MAX_DEPTH = 100
_SHOWN = 80
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def shown(value: Any) -> str:
    """A value that a stranger wrote, as a message shows it: its ``repr``, cut to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of too many digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{shown(text)} is too large a number")
    return found


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {shown(next(n for n in names if names.count(n) > 1))} occurs twice")
    return found


def _is_deep(found: Any) -> bool:
    level = [found]
    for _ in range(MAX_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [item for items in children for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _parse(text: str) -> Any:
    found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_duplicates)
    if isinstance(found, dict | list) and _is_deep(found):
        raise RecursionError
    if _SURROGATE.search(text):
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def read_object(path: Path, error: type[GraceError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in ``path``; anything else is one line of ``error``."""
    try:
        state = path.stat()
        if state.st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for
            raise ValueError("it is no plain file")
        found = _parse(path.read_bytes().decode("utf-8"))
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}; expected a JSON file") from reason
    except RecursionError as reason:
        raise error(f"{path} is no usable JSON: nested too deeply") from reason
    except ValueError as reason:
        raise error(f"{path} is no usable JSON: {reason}") from reason
    if not isinstance(found, dict):
        raise error(f"{path} holds a JSON {type(found).__name__}; expected an object")
    return found
