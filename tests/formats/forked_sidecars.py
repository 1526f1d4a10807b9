"""Forks the process that opens a pickle (``formats/sidecar.py``), so that no test waits for its imports.

The server is a process of its own that never computes: a fork of one whose OpenMP pool has run would hang. Each line on
its standard input is JSON [arguments, seconds]; the answer is JSON [exit status, standard error].
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

Started = Callable[[list[str], float], "subprocess.CompletedProcess[str]"]


class ForkedSidecars:
    """``run`` does what ``started``, the product's own way, does."""

    def __init__(self, started: Started) -> None:
        self.started = started
        self._server: subprocess.Popen[str] | None = None

    def begin(self) -> subprocess.Popen[str]:
        """The server, started if it was not yet."""
        if self._server is None:
            self._server = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True)
        return self._server

    def run(self, arguments: list[str], seconds: float, folder: str) -> subprocess.CompletedProcess[str]:
        server = self.begin()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([arguments, seconds]) + "\n")
        server.stdin.flush()
        status, said = json.loads(server.stdout.readline())
        if status == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(arguments, seconds)
        return subprocess.CompletedProcess(arguments, status, "", said)

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()


def _fork(main: Callable[[list[str]], int], arguments: list[str], seconds: float) -> tuple[int, str]:
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(said.fileno(), 2)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                status = main(arguments)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        _, waited = os.waitpid(pid, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(waited), said.read().decode("utf-8", "replace")


def _serve() -> Any:
    import torch

    torch.set_num_threads(1)
    from grace_vlm.formats.sidecar import main

    for line in sys.stdin:
        print(json.dumps(_fork(main, *json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
