"""Runs in an environment with xllamacpp and without grace: the text that llama.cpp's server makes of a chat.

    python ask_llama_cpp_form.py FOLDER REQUEST.json OUT.json

REQUEST: the body of a chat request, pictures as data URLs. OUT: the prompt, a string.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ask_llama_cpp import post, serve


def main() -> int:
    folder, request, out = map(Path, sys.argv[1:])
    reply = post(serve(folder), "/apply-template", json.loads(request.read_text(encoding="utf-8")))
    out.write_text(json.dumps(reply["prompt"]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
