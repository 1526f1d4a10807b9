"""The closed set of errors a user can cause.

Every one is printed by the command line as a single line, ``error: <message>``, and ends the process with its own
exit code. The message says what was given, what was expected and what to do. Anything else that escapes is a bug of
ours and shows its traceback.
"""

from __future__ import annotations

_MAX_CHARS = 4000


def printable(text: str) -> str:
    """One line that shows control characters escaped, and only its beginning if it is long."""
    shown = text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}... ({len(text):,} characters)"
    return shown if shown.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


class GraceError(Exception):
    """Base of the user errors; never raised itself.

    A message may name what a stranger wrote: control characters in it are shown escaped, and only its beginning.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(GraceError):
    """A recipe, an override, a scheme or a flag that cannot be honoured."""

    exit_code = 2


class DataError(GraceError):
    """Rows or images that are missing, unreadable or over the budget of bad rows."""

    exit_code = 3


class FormatError(GraceError):
    """A foreign or corrupt file: wrong layout, wrong dtype, a shape that lies."""

    exit_code = 4


class CheckpointError(GraceError):
    """A checkpoint or output folder that cannot be read, written or trusted."""

    exit_code = 5


class NonFiniteError(GraceError):
    """NaN or Inf in a loss term, a gradient or a scale; raised before any weight changes."""

    exit_code = 6


class RequestError(GraceError):
    """One request to a model that cannot be answered; other requests go on."""

    exit_code = 7


class OtherProcessError(GraceError):
    """Another process of the run failed, and why; the exit code is that one's."""

    exit_code = 8

    def __init__(self, reason: str, exit_code: int = 1) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class StoppedError(GraceError):
    """A run that was asked to stop has stopped, with a checkpoint; the exit code is 128 and the signal's number."""

    exit_code = 128 + 15

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)
        self.number, self.exit_code = number, 128 + number
