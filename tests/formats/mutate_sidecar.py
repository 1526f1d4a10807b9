"""Damage to ``qat_quantized_weights.bin``: to the zip, to the pickle in it, and to what the pickle says."""

from __future__ import annotations

import io
import random
import zipfile
from typing import Any

import torch
from hostile_values import STRINGS, changed_bytes


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _zip(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    what = rng.choice(
        ("deflated", "doubled entry", "missing entry", "foreign entry", "renamed", "comment", "no pickle")
    )
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(out, "w") as target:
        entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
        if what == "deflated":
            target.compression = zipfile.ZIP_DEFLATED
        elif what == "missing entry":
            entries.pop(rng.randrange(len(entries)))
        elif what == "foreign entry":
            entries.append(
                (rng.choice(("../outside", "/etc/passwd", "archive/code/x.py", "archive/constants.pkl")), b"x")
            )
        elif what == "renamed":
            entries = [(name.replace("archive/", "../archive/"), data) for name, data in entries]
        elif what == "no pickle":
            entries = [(name, b"" if name.endswith(".pkl") else data) for name, data in entries]
        elif what == "comment":
            target.comment = rng.randbytes(100)
        for name, data in entries:
            target.writestr(name, data)
    if what == "doubled entry":
        return what, out.getvalue() + out.getvalue()
    return what, out.getvalue()


def _pickle(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Bytes of ``data.pkl``, whose check sum the zip's reader would else find wrong."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(out, "w") as target:
        said = ""
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                said, data = changed_bytes(data, rng)
            target.writestr(entry.filename, data)
    return f"pickle: {said}", out.getvalue()


def _content(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    found = torch.load(io.BytesIO(raw), weights_only=True)
    key = rng.choice(list(found))
    tensor = found[key].clone()
    what = rng.choice(("value", "dtype", "shape", "drop", "rename", "type", "extra", "stride", "exchange", "none"))
    if what == "value":
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, 1000.0, -1000.0, 89.0, 1e-30))
        tensor.view(-1)[rng.randrange(tensor.numel()) :][: rng.choice((1, tensor.numel()))] = value
        found[key] = tensor
    elif what == "dtype":
        found[key] = tensor.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)))
    elif what == "shape":
        found[key] = rng.choice(
            (tensor.flatten(), tensor[:0], tensor[None], tensor[:-1], torch.tensor(1.0), tensor.flatten()[:1])
        )
    elif what == "drop":
        del found[key]
    elif what == "rename":
        found[rng.choice((*STRINGS, f"{key}x", f"x.{key}"))] = found.pop(key)
    elif what == "type":
        found[key] = rng.choice((None, 1, "x", [tensor], {"a": tensor}, torch.nn.Parameter(tensor.float())))
    elif what == "extra":
        found[rng.choice(("ghost.weight", "ghost.log_scale", "ghost.bias", 7, (), None))] = tensor
    elif what == "stride":
        found[key] = rng.choice((torch.zeros(1).expand(1 << 40), tensor.t() if tensor.ndim == 2 else tensor[::2]))
    elif what == "exchange":
        other = rng.choice(list(found))
        found[key], found[other] = found[other], found[key]
    else:
        return "another dict", _saved(rng.choice(([], {}, None, list(found.values()), {"a": found})))
    return f"{what} {key}", _saved(found)


def mutate_sidecar(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the damaged file)."""
    return rng.choice((_zip, _pickle, _pickle, _content, _content, changed_bytes))(raw, rng)
