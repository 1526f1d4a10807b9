"""bench_cpu_decode.py: a body without its head, what a server is asked, its rows."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engine")]

import bench_cpu_decode as bench  # noqa: E402
from bench_decode import quantized  # noqa: E402
from worlds import loaded_toy  # noqa: E402

from grace_vlm.engine.engine import Engine, EngineOptions  # noqa: E402
from grace_vlm.kernels.cpu import why_not  # noqa: E402


def test_what_does_not_depend_on_layers_falls_out() -> None:
    head, layer = 20.0, 1.5
    few, many = ([head + drift + layer * n for drift in (0.0, 5.0)] for n in (4, 8))
    assert bench.body_ms(few, many, (4, 8), 28) == [28 * layer] * 2


def test_rows() -> None:
    args = SimpleNamespace(layers=(4, 8), impls=["ours"], model=bench.MODEL, context=32)
    place = bench.place_of(torch.device("cpu"))
    rows = bench.rows_of(args, {("ours", 4): [10.0, 12.0, 11.0], ("ours", 8): [16.0, 18.0, 17.0]}, place)
    assert [(row["case"], row["metric"]) for row in rows] == [
        ("l4_c32", "tok_s"), ("l8_c32", "tok_s"), ("body_c32", "body_ms"),
    ]  # fmt: skip
    assert float(rows[0]["p50"]) == pytest.approx(1000 / 11, rel=1e-5)
    assert float(rows[2]["p50"]) == 28 * 1.5


def test_turns_are_taken_in_rounds_and_the_first_is_not_counted() -> None:
    taken: list[str] = []

    def turn(name: str) -> Any:
        return lambda: taken.append(name) or float(len(taken))

    samples = bench.timed_rounds({("ours", 4): turn("a"), ("ours", 8): turn("b")}, 2)
    assert taken == ["a", "b"] * 3
    assert samples == {("ours", 4): [3.0, 5.0], ("ours", 8): [4.0, 6.0]}


@pytest.mark.skipif(why_not() is not None, reason="no kernel on this processor")
def test_our_turn_is_the_time_of_a_token() -> None:
    loaded = loaded_toy("student")
    engine = Engine(loaded, quantized(loaded.model), EngineOptions(max_running=1, int8_head=True))
    assert 0 < bench.our_turn(engine, 20, 6)() < 1000


class Answer(BaseHTTPRequestHandler):
    """Answers as llama.cpp's server does, and keeps what it was asked."""

    asked: ClassVar[list[dict[str, Any]]] = []
    made = 9

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        timings = {"prompt_n": len(self.asked[-1]["prompt"]), "predicted_n": self.made, "predicted_ms": 80.0}
        body = json.dumps({"timings": timings}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    made = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield SimpleNamespace(listening_address=f"http://127.0.0.1:{made.server_port}")
    made.shutdown()
    made.server_close()


def test_a_server_is_asked_for_our_prompt_and_counts_from_its_first_token(server: SimpleNamespace) -> None:
    assert bench.llama_turn(server, 20, 9, 151_936)() == 10.0
    (prompt,) = bench.prompts(1, 20, 151_936)
    assert Answer.asked[-1]["prompt"] == prompt.ids.tolist()
    assert Answer.asked[-1]["ignore_eos"] is True
    with pytest.raises(ValueError, match=r"^llama\.cpp read 20 tokens and made 9$"):
        bench.llama_turn(server, 20, 12, 151_936)()


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp not installed")
@pytest.mark.skipif(why_not() is not None, reason="no kernel on this processor")
def test_llama_cpp_says_what_it_was_compiled_for() -> None:
    assert "AVX2" in bench.llama_version().split()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--layers", "8,4"), "--layers takes two numbers above 3, the smaller one first, for example 4,8"),
        (("--layers", "3,8"), "--layers takes two numbers above 3, the smaller one first, for example 4,8"),
        (("--impls", "ours,vllm"), "--impls 'vllm' is no implementation; there are ours, llama_cpp"),
        (("--tokens", "1"), "--context, --rounds and --threads must be at least 1, --tokens 2"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(list(arguments))
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
