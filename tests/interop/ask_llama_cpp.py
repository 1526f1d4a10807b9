"""Runs in an environment with xllamacpp and without grace: the next token of prompts, by llama.cpp.

    python ask_llama_cpp.py FOLDER QUESTIONS.json OUT.json

QUESTIONS: a list of {"prompt": text, "pictures": [PNG files]}; a prompt has ``<__media__>`` where a picture stands.
OUT: a list of {"tokens": number of tokens of the prompt, "logprobs": log-probability by token id}.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import xllamacpp

# Else the server makes up a marker of its own each time it starts.
os.environ["LLAMA_MEDIA_MARKER"] = "<__media__>"


def load(folder: Path) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.mmproj.path = str(folder / "mmproj.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.ui = 2048, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    # A cached prefix is computed in batches of other sizes: the same, but not to the last bit.
    params.cache_prompt, params.cache_ram_mib = False, 0
    return xllamacpp.Server(params)


def ask(server: xllamacpp.Server, prompt: str, pictures: list[str], vocab_size: int, letter: int) -> dict[str, object]:
    request = {
        "prompt": {
            "prompt_string": prompt,
            "multimodal_data": [base64.b64encode(Path(picture).read_bytes()).decode() for picture in pictures],
        }
        if pictures
        else prompt,
        "n_predict": 1,
        "n_probs": vocab_size,
        "temperature": 0.0,
        # The token that is taken does not change the probabilities, but half a character would not be answered.
        "logit_bias": [[letter, 1000.0]],
        "cache_prompt": False,
    }
    call = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(call, timeout=120) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        sys.exit(f"llama.cpp refused {prompt!r}: {error.read().decode()}")
    (taken,) = answer["completion_probabilities"]
    return {
        "tokens": answer["tokens_evaluated"],
        "logprobs": {str(one["id"]): one["logprob"] for one in taken["top_logprobs"]},
    }


def main() -> int:
    if importlib.util.find_spec("grace_vlm") is not None:
        sys.exit("grace_vlm can be imported here: this environment proves nothing")
    folder, questions, out = map(Path, sys.argv[1:])
    stated = json.loads(questions.read_text(encoding="utf-8"))
    server = load(folder)
    answers = [
        ask(server, one["prompt"], one["pictures"], stated["vocab_size"], stated["letter"]) for one in stated["questions"]
    ]
    out.write_text(json.dumps(answers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
