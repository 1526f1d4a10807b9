"""A model's name that means nothing on the hub, or a hub that cannot be reached: one line, within seconds."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_SECONDS = 20.0
"""The client's own repetitions alone take 23; a Python with torch and transformers starts in a few."""
CLOSED = "http://127.0.0.1:9"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub without models, as huggingface.co says so."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def empty_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(cache: Path, endpoint: str, offline: str, *args: str) -> tuple[int, str, float]:
    """(exit code, standard error, seconds) of a command that asks the hub."""
    hub = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "grace_vlm.cli.main", *args],
        env={**os.environ, **hub}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr, time.monotonic() - started


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    code, said, seconds = ask(tmp_path, CLOSED, "0", "chat", "nosuch/model", "--question", "hello")
    assert said == (
        f"error: nosuch/model is no folder here and not in the hub's cache, and {CLOSED} gives nothing ([Errno 111] "
        "Connection refused); check the name and the connection, or give a model folder\n"
    )
    assert code == 2
    assert seconds < MOST_SECONDS


def test_a_hub_that_is_not_to_be_asked(tmp_path: Path) -> None:
    code, said, _ = ask(tmp_path, CLOSED, "1", "chat", "nosuch/model", "--question", "hello")
    assert said == (
        f"error: nosuch/model is no folder here and not in the hub's cache, and {CLOSED} gives nothing "
        "(HF_HUB_OFFLINE is set); check the name and the connection, or give a model folder\n"
    )
    assert code == 2


def test_a_name_that_the_hub_does_not_have(tmp_path: Path, empty_hub: str) -> None:
    code, said, _ = ask(tmp_path, empty_hub, "0", "plan", "nosuch/model")
    assert said == (
        "error: nosuch/model is no folder here, and no model on the hub or a private one; check the name, or log in "
        "with hf auth login\n"
    )
    assert code == 2


def test_weights_that_are_missing_in_the_cache_take_no_longer(tmp_path: Path) -> None:
    """The configuration was fetched once, by grace plan, say; then the line went dead."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code, said, seconds = ask(tmp_path, CLOSED, "0", "chat", "some/model", "--question", "hello")
    last = said.splitlines()[-1]  # before it the client's own word that it has a configuration
    assert last.startswith("error: some/model is no folder here and not in the hub's cache, and ")
    assert code == 2
    assert seconds < MOST_SECONDS
