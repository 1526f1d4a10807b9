"""Runs in an environment with xllamacpp and without grace: the next token of prompts, by llama.cpp's server.

    python ask_llama_cpp.py FOLDER QUESTIONS.json OUT.json

OUT: a list of {"num_tokens": of the whole prompt, "pieces": tokens of the text before and after the picture,
"logprobs": log-probability by token id}.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import xllamacpp

MARKER = "<__media__>"
os.environ["LLAMA_MEDIA_MARKER"] = MARKER  # else the server makes up another each time it starts
PICTURE = re.compile(r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<image>")


def serve(folder: Path) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.mmproj.path = str(folder / "mmproj.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.ui = 2048, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    # A cached prefix is computed in batches of other sizes: the same, but not to the last bit.
    params.cache_prompt, params.cache_ram_mib = False, 0
    return xllamacpp.Server(params)


def post(server: xllamacpp.Server, path: str, request: dict[str, object]) -> dict[str, object]:
    body = json.dumps(request).encode()
    call = urllib.request.Request(server.listening_address + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=120) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        sys.exit(f"llama.cpp refused {str(request)[:200]}: {error.read().decode()}")


def ask(server: xllamacpp.Server, question: dict[str, list[str]], vocab_size: int, letter: int) -> dict[str, object]:
    prompt = PICTURE.sub(MARKER, question["prompt"])
    pictures = [base64.b64encode(Path(path).read_bytes()).decode() for path in question["pictures"]]
    request = {
        "prompt": {"prompt_string": prompt, "multimodal_data": pictures} if pictures else prompt,
        "n_predict": 1,
        "n_probs": vocab_size,
        "temperature": 0.0,
        # Probabilities are those before the bias; it takes care that the token taken is a whole character.
        "logit_bias": [[letter, 1000.0]],
        "cache_prompt": False,
    }
    answer = post(server, "/completion", request)
    pieces = [
        post(server, "/tokenize", {"content": piece, "add_special": number == 0, "parse_special": True})["tokens"]
        for number, piece in enumerate(prompt.split(MARKER))
    ]
    (taken,) = answer["completion_probabilities"]
    logprobs = {one["id"]: one["logprob"] for one in taken["top_logprobs"]}
    return {"num_tokens": answer["tokens_evaluated"], "pieces": pieces, "logprobs": logprobs}


def main() -> int:
    if importlib.util.find_spec("grace_vlm") is not None:
        sys.exit("grace_vlm can be imported here: this environment proves nothing")
    folder, questions, out = map(Path, sys.argv[1:])
    stated = json.loads(questions.read_text(encoding="utf-8"))
    server = serve(folder)
    answers = [ask(server, question, stated["vocab_size"], stated["letter"]) for question in stated["questions"]]
    out.write_text(json.dumps(answers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
