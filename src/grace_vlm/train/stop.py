"""Asked to stop: by a scheduler that wants the machine back, or by a person.

SIGTERM, SIGINT and SIGUSR1 (what Slurm sends ahead with ``--signal=USR1@300``) are noted; the loop ends with the step
that runs, on every process with the same one, and writes a checkpoint. A second signal ends the process at once, as it
would have.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequests:
    """``with StopRequests() as asked:`` notes the signals inside while it is ``patient``, and else lets them do what
    they did before. In a thread that is not the main one it sees none."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that came; 0: none."""
        self.patient = False
        """Whether somebody looks at ``number`` soon."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.patient and not self.number:
            self.number = number
            return
        signal.signal(number, self._before[number])
        signal.raise_signal(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
