"""A server with OpenAI's interface, here a small one: what is sent, what is tried again, what is an error."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from boards import png, write_mmstar

from grace_vlm.cli.main import main
from grace_vlm.evals.suite.questions import Benchmark
from grace_vlm.evals.suite.responders import EndpointResponder
from grace_vlm.evals.suite.run import read_benchmarks


class Server:
    """Keeps what it is sent; the first answers' status codes are given."""

    def __init__(self, statuses: list[int]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    status = statuses.pop(0) if statuses else 200
                    outer.bodies.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                words = body["messages"][0]["content"][-1]["text"].count("(")
                said = {
                    "choices": [{"message": {"content": f"B {words}"}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 2},
                }
                data = json.dumps(said if status == 200 else {"error": "no"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def board(tmp_path: Path) -> Benchmark:
    write_mmstar(tmp_path / "mmstar", 6, broken=3)
    return read_benchmarks(["mmstar"], tmp_path)[0][0]


@pytest.fixture
def served() -> Iterator[Any]:
    servers: list[Server] = []

    def start(*statuses: int) -> Server:
        servers.append(Server(list(statuses)))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_what_is_sent_and_kept(board: Benchmark, served: Any) -> None:
    server = served()
    replies = {r.doc: r for r in EndpointResponder(server.url, "big", "secret", 3).answers(board.questions(["card"]))}
    assert sorted(replies) == [str(number) for number in range(6)]
    assert replies["3"].text is None, "its picture is none"
    good = replies["0"]
    assert (good.text, good.finish, good.tokens) == ("B 4", "stop", (7, 2))
    assert set(server.keys) == {"Bearer secret"}
    body = next(body for body in server.bodies if "number 0?" in body["messages"][0]["content"][-1]["text"])
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0, 64)
    picture, text = body["messages"][0]["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == png(0)
    assert text["text"].startswith("Question: What is number 0?\nLook well.\nOptions:\n(A) red\n")


def test_a_busy_server_is_asked_again(board: Benchmark, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = served(503, 429)
    replies = list(EndpointResponder(server.url, "big", together=1).answers(board.questions(["card"])))
    assert sum(reply.text is not None for reply in replies) == 5
    assert len(server.bodies) == 5 + 2


def test_a_refusal_and_a_server_that_is_not_there_are_errors(
    board: Benchmark, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = served(400)
    replies = list(EndpointResponder(server.url, "big", together=1).answers(board.questions(["card"])))
    refused = [reply.error for reply in replies if reply.error and "says 400" in reply.error]
    assert len(refused) == 1
    assert refused[0].startswith(f"RequestError: {server.url} says 400: ")
    nobody = EndpointResponder("http://127.0.0.1:9/v1", "big", tries=2)
    errors = [reply.error for reply in nobody.answers(board.questions(["card"]))]
    assert sum("cannot be reached" in str(error) for error in errors) == 5


def test_a_suite_that_nobody_answers_ends_with_an_error(
    board: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def grace(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["grace", "eval", "big", "--suite", "card", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    out = tmp_path / "out"
    code, err = grace("--data", tmp_path, "--task", "mmstar", "--out", out, "--endpoint", "notaurl")
    assert code == 2
    assert err == "error: --endpoint is notaurl; expected a URL such as http://localhost:8000/v1\n"
    assert not (out / "run.json").exists(), "no answers, no evaluation"
    code, err = grace("--data", tmp_path, "--task", "mmstar", "--out", out, "--endpoint", "http://127.0.0.1:9/v1")
    assert code != 0
    assert "6 of 6 questions have no answer and count as wrong, the first because " in err
    assert (out / "scores.json").is_file()
