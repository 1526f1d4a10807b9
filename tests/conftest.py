"""What all tests share. Any test may import ``toy_run`` (tests/faults), the smallest run there is, and ``worlds``
(tests/engine), toys of every family and what Transformers answers.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported: kernels are then tested in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("models", "faults", "engine")]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread only waits, and waits long when other programs share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def grace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command; (exit code, standard output, standard error)."""
    from grace_vlm.cli.main import main

    def run(*args: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["grace", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run
