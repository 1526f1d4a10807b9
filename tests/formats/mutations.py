"""One generator of damaged model folders: case ``number`` is the same whenever and wherever it is made.

A case is a base folder and what happens to a few of its files. ``changes`` maps a path in the folder to its new bytes,
to None (the file is gone) or to an ``Odd`` thing that stands there instead.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mutate_gguf import mutate_gguf
from mutate_json import mutate_json
from mutate_safetensors import mutate_safetensors
from mutate_sidecar import mutate_sidecar

SIDECAR = "qat_quantized_weights.bin"
CERTIFICATE = "grace-certificate.json"
_OFTEN = ("config.json", "grid/plan.json", "model.safetensors.index.json", "awq_quantized_modules.json", SIDECAR)
_RARE = (CERTIFICATE, "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_STRAYS = (
    *(
        "x.gguf",
        "x.safetensors",
        "x.json",
        "x.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "grid",
        "state.json",
    ),
    *("final", "awq_quantized_modules.json", SIDECAR, "config.json", "grid/plan.json", "grid/x.safetensors", "LICENSE"),
    *("grid/codes-00002-of-00002.safetensors", "manifest.sha256", "model-00001-of-00002.safetensors", "a\nb.gguf"),
)


@dataclass(frozen=True)
class Odd:
    """What stands in the place of a file: a folder, a pipe, or a link to ``target`` (``{canary}`` is filled in)."""

    kind: Literal["folder", "fifo", "link"]
    target: str = ""


Change = bytes | Odd | None


@dataclass(frozen=True)
class Case:
    """Case ``number``: ``base`` with ``changes``, which ``description`` says in words."""

    number: int
    base: str
    description: str
    changes: dict[str, Change]


def _weight_of_base(name: str) -> float:
    """Reading a pickle costs a process: few of those. The larger, real models are read less often, too."""
    layout = name.rpartition("-")[0]
    return (0.5 if layout == "official" else 4) * (0.2 if "real" in name else 1)


def _file_in(files: Mapping[str, bytes], rng: random.Random) -> str:
    names = [name for name in files if name in (*_OFTEN, *_RARE) or name.endswith((".safetensors", ".gguf"))]
    shares = dict.fromkeys(names, 12) | dict.fromkeys(_RARE, 1) | {SIDECAR: 30}
    return rng.choices(sorted(names), [shares[name] for name in sorted(names)])[0]


def _odd(name: str, rng: random.Random) -> tuple[str, Odd | None]:
    kind = rng.choice(("missing", "folder", "fifo", "link to a copy", "dangling link", "loop", "device", "link inside"))
    odd = {
        "missing": None,
        "folder": Odd("folder"),
        "fifo": Odd("fifo"),
        "link to a copy": Odd("link", "{canary}/" + name),
        "dangling link": Odd("link", "{canary}/nothing"),
        "loop": Odd("link", name.rpartition("/")[2]),
        "device": Odd("link", "/dev/zero"),
        "link inside": Odd("link", "config.json"),
    }
    return kind, odd[kind]


def _in_the_folder(files: Mapping[str, bytes], rng: random.Random) -> tuple[str, dict[str, Change]]:
    """Files that are missing, too many, exchanged, or no files."""
    what = rng.choice(("odd", "odd", "odd", "stray", "stray", "exchange", "copy", "grid"))
    name, other = _file_in(files, rng), _file_in(files, rng)
    if what == "odd":
        said, odd = _odd(name, rng)
        return f"{name} is {said}", {name: odd}
    if what == "exchange":
        return f"{name} and {other} exchanged", {name: files[other], other: files[name]}
    if what == "grid" and any(path.startswith("grid/") for path in files):
        return "grid is a link to a copy", {"grid": Odd("link", "{canary}/grid")}
    stray = rng.choice(_STRAYS)
    if what == "copy":
        return f"{stray} is a copy of {name}", {stray: files[name]}
    said, odd = _odd(stray, rng)
    return f"{stray} is {said}", {stray: odd}


def _damaged(name: str, raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    if name.endswith(".json"):
        return mutate_json(raw, rng)
    if name.endswith(".safetensors"):
        return mutate_safetensors(raw, rng)
    return mutate_gguf(raw, rng) if name.endswith(".gguf") else mutate_sidecar(raw, rng)


def case(number: int, bases: Mapping[str, Mapping[str, bytes]]) -> Case:
    """Case ``number`` of the folders ``bases`` (name -> path in the folder -> bytes)."""
    rng = random.Random(number)
    names: Sequence[str] = sorted(bases)
    base = rng.choices(names, [_weight_of_base(name) for name in names])[0]
    files = bases[base]
    if rng.random() < 0.08:
        said, changes = _in_the_folder(files, rng)
        return Case(number, base, said, changes)
    changes, said_of = {}, []
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2))):
        name = _file_in(files, rng)
        said, changes[name] = _damaged(name, files[name], rng)
        said_of.append(f"{name}: {said}")
    return Case(number, base, "; ".join(said_of), changes)
