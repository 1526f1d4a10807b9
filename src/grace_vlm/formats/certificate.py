"""A certificate: what a model is, in 64 hexadecimal digits, whatever the layout that holds it.

    {"format_version": 1,
     "root": SHA-256 of the lines ["linears" or "tensors", <tensor>, <what is certified of it>] in JSON, sorted,
     "linears": {<module>: {"scheme": "w4g128", "shape": [out, in], "codes": digest, "scale": digest}},
     "tensors": {<name>: {"shape": [...], "values": digest}}}

Digests are of values (values.py), so the certificate of a folder is that of every exact conversion of it, and equality
can be checked without the source. As in a Merkle tree, two roots that differ lead to the tensors that differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import CERTIFICATE, ModelContent
from grace_vlm.formats.lazy import ahead, spec_of
from grace_vlm.formats.values import compare_values, digest
from grace_vlm.quant.affine import bake
from grace_vlm.quant.scheme import QuantizedTensor

VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
Certificate = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all)."""
Stored = Callable[[str, QuantizedTensor], QuantizedTensor]


def certify(
    content: ModelContent, progress: Progress | None = None, stored: Stored = lambda name, tensor: tensor
) -> Certificate:
    """The certificate of a model; reads each tensor once.

    Args:
        stored: what is certified of a linear in place of itself, after it was checked as it is.

    Raises:
        FormatError: a tensor is wrong in itself, or a stored BF16 weight is not bf16(q * s).
    """
    sizes = {name: entry.out_features * entry.in_features for name, entry in content.linears.items()}
    sizes |= {name: spec_of(content.dense, name).num_bytes // 2 for name in content.dense}
    done, total = 0, sum(sizes.values())
    linears: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    # Hashing leaves the interpreter lock alone, so the two halves of a linear overlap.
    with ThreadPoolExecutor(max_workers=1) as pool:
        for name, tensor in ahead(content.quantized, content.linears):
            hashed = pool.submit(_linear, stored(name, tensor))
            _require_baked(name, tensor, content)
            linears[name] = hashed.result()
            done += sizes[name]
            if progress:
                progress(done, total)
    for name, values in ahead(content.dense):
        tensors[name] = {"shape": list(values.shape), "values": digest(values)}
        done += sizes[name]
        if progress:
            progress(done, total)
    certificate: Certificate = {"format_version": VERSION, "root": "", "linears": linears, "tensors": tensors}
    return {**certificate, "root": root_of(certificate)}


def _linear(tensor: QuantizedTensor) -> dict[str, Any]:
    return {
        "scheme": tensor.scheme.name,
        "shape": list(tensor.shape),
        "codes": digest(tensor.codes),
        "scale": digest(tensor.scale),
    }


def _require_baked(name: str, tensor: QuantizedTensor, content: ModelContent) -> None:
    if name in content.baked:
        found = compare_values(f"{name}.weight", content.baked[name], bake(tensor))
        if found is not None:
            raise FormatError(
                f"{found.tensor}{list(found.index or ())} is {found.a} in {content.folder}, not {found.b} = bf16(q * s)"
            )


def _lines(certificate: Certificate) -> Iterator[tuple[tuple[str, str], str]]:
    """((section, tensor), everything that is certified of it), one each."""
    for name, linear in certificate["linears"].items():
        yield ("linears", f"{name}.codes"), f"{linear['scheme']} {linear['shape']} {linear['codes']}"
        yield ("linears", f"{name}.scale"), linear["scale"]
    for name, tensor in certificate["tensors"].items():
        yield ("tensors", name), f"{tensor['shape']} {tensor['values']}"


def root_of(certificate: Certificate) -> str:
    """The root that the tensors of a certificate have."""
    # In JSON: a name with a line's end in it must not look like two tensors.
    lines = sorted(json.dumps([*key, what]) for key, what in _lines(certificate))
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def differing(a: Certificate, b: Certificate) -> list[str]:
    """The tensors that two certificates do not agree on, sorted."""
    ours, theirs = dict(_lines(a)), dict(_lines(b))
    return sorted({name for _, name in (k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))})


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Put it beside a model; ``folder`` is a stage that the caller publishes."""
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_certificate(path: Path) -> Certificate:
    """A certificate file, checked against its own root; ``FormatError`` if it is none."""
    found = read_object(path, FormatError)
    if type(found.get("format_version")) is not int or found["format_version"] != VERSION:
        raise FormatError(f"{path} has format_version {found.get('format_version')!r}; this grace reads {VERSION}")
    for section, keys in (("linears", {"scheme", "shape", "codes", "scale"}), ("tensors", {"shape", "values"})):
        listed = found.get(section)
        if not isinstance(listed, dict):
            raise FormatError(f"{path} has no object {section!r}")
        for name, item in listed.items():
            digests = [item.get(k) for k in keys & {"codes", "scale", "values"}] if isinstance(item, dict) else []
            if (
                not digests
                or item.keys() != keys
                or not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in digests)
            ):
                raise FormatError(f"{path} says of {name} {item!r}; expected {', '.join(sorted(keys))}")
    if found.get("root") != root_of(found):
        raise FormatError(f"{path} has a root that is not that of its tensors; it was damaged or changed")
    return found
