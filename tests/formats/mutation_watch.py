"""What a reader may not do, watched from within its process: files, commands, memory, time, and how errors look."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CASE_SECONDS = 5
ROOM_BYTES = 1 << 30
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate")
_COMMANDS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
_MAX_CHARS = 10_000


class Hang(BaseException):
    """Longer than ``CASE_SECONDS``; no ``Exception``, so that nothing takes it for a user's error."""


class Watch:
    """Records what is opened and changed while it is ``on``. Audit hooks stay for ever: for a process of its own.

    Args:
        readable: folders in which files may be opened, besides the interpreter's own. writable: also changed.
    """

    def __init__(self, readable: list[Path], writable: list[Path]) -> None:
        own = [sys.prefix, sys.base_prefix, "/proc/self", "/usr", str(Path(__file__).parents[2] / "src")]
        self.readable = tuple(f"{os.path.realpath(path)}/" for path in (*readable, *writable, *own))
        self.writable = tuple(f"{os.path.realpath(path)}/" for path in writable)
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGALRM, self._late)

    def _late(self, *_: Any) -> None:
        raise Hang

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        # shutil.rmtree goes by bare names within a folder that it has open.
        if event == "open" and not isinstance(arguments[0], int) and os.sep in os.fsdecode(arguments[0]):
            name, writes = os.path.realpath(os.fsdecode(arguments[0])), bool((arguments[2] or 0) & _WRITES)
            if not name.startswith(self.writable if writes else self.readable):
                self.seen.append(f"{'wrote' if writes else 'opened'} {name}")
        elif event in _CHANGES:
            name = os.path.realpath(os.path.dirname(os.fsdecode(arguments[0])))
            if not f"{name}/".startswith(self.writable) and os.path.isabs(os.fsdecode(arguments[0])):
                self.seen.append(f"{event} of {arguments[0]}")
        elif event in _COMMANDS:
            self.seen.append(f"{event} {arguments[:2]}")

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """What is seen in the block; ``Hang`` after ``CASE_SECONDS``."""
        self.seen = []
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        self.on = True
        try:
            yield self.seen
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)


def cap_memory() -> None:
    """Let this process take ``ROOM_BYTES`` more address space."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))


def fault_of(error: BaseException) -> str | None:
    """What is wrong with the text of a user's error; None if nothing is."""
    said = str(error)
    if "\n" in said or not said.isprintable():
        return f"is not one plain line: {said[:300]!r}"
    if "Traceback" in said or not said.strip():
        return f"says {said[:300]!r}"
    return f"has {len(said)} characters: {said[:300]!r}" if len(said) > _MAX_CHARS else None
