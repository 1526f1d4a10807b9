"""Are two folders the same model, value for value, whatever their layouts?

Compared are, by name: for each quantized linear its scheme, codes, scales and BF16 weight (stored, or bf16(q * s));
every other tensor; and the model's configuration, without what layouts and libraries write into it. By value means
-0.0 equals +0.0, a NaN equals a NaN in its place, and a dtype is no difference if the values are the same. Also, each
side must agree with itself: a stored BF16 weight must be bf16(q * s).

A certificate is of tensors alone; ``verify_certificate`` therefore also asks the folder's manifest, where there is one,
whether its other files are those that were published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.manifest import changed_files
from grace_vlm.errors import FormatError
from grace_vlm.formats.certificate import Progress, certify, differing, read_certificate
from grace_vlm.formats.converter import CERTIFICATE, ModelContent
from grace_vlm.formats.folder import resolve_model
from grace_vlm.formats.llava_original import in_the_names_of
from grace_vlm.formats.registry import read_model
from grace_vlm.formats.values import Difference, compare_values
from grace_vlm.formats.weights import require_inside
from grace_vlm.quant.affine import bake

_WEIGHT_FILES = (".safetensors", ".bin", ".gguf")
_WRITTEN_BY_LIBRARIES = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "use_cache"}


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and the first difference: linears first, then other tensors, each in the order of layers.

    Args:
        layout_a, layout_b: converter names.
        num_linears, num_codes, num_scales: quantized linears, their codes and scales compared.
        num_tensors, num_values: other tensors and their values compared.
        num_different: tensors (codes, scales, weights, others) that differ.
        first: the first difference, None if equal.
    """

    layout_a: str
    layout_b: str
    num_linears: int
    num_codes: int
    num_scales: int
    num_tensors: int
    num_values: int
    num_different: int
    first: Difference | None

    @property
    def equal(self) -> bool:
        return self.first is None


def _by_layer(name: str) -> list[str | tuple[int, str]]:
    """A sorting key under which layer 2 comes before layer 10."""
    # Every second part is a number, which may have more digits than ``int`` takes.
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part) if index % 2 else part for index, part in enumerate(parts)]


def _presence(name: str, a: Mapping[str, Any], b: Mapping[str, Any], what: str) -> Difference | None:
    if name in a and name in b:
        return None
    sides = [what if name in side else "missing" for side in (a, b)]
    return Difference(name, None, *sides)


def _linear_differences(name: str, a: ModelContent, b: ModelContent) -> Iterator[Difference | None]:
    """Scheme, codes, scale, weight of one quantized linear that both have."""
    ours, theirs = a.quantized[name], b.quantized[name]
    if ours.scheme.name != theirs.scheme.name:
        yield Difference(name, None, ours.scheme.name, theirs.scheme.name)
        return
    yield compare_values(f"{name}.codes", ours.codes, theirs.codes)
    yield compare_values(f"{name}.scale", ours.scale, theirs.scale)
    made = bake(ours), bake(theirs)
    stored = a.baked.get(name, made[0]), b.baked.get(name, made[1])
    yield compare_values(f"{name}.weight", *stored)
    for side, weight, product in zip("AB", stored, made, strict=True):
        found = compare_values(f"{name}.weight", weight, product)
        if found is not None:
            yield Difference(f"{name}.weight of {side}", found.index, f"{found.a} stored", f"{found.b} = bf16(q * s)")


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Keys of two ``config.json`` that do not say the same, dotted; empty where one has none (a bare GGUF file).

    ``_WRITTEN_BY_LIBRARIES`` is left out: it says who wrote the file, not what the model computes.
    """
    if not prefix and not (a and b):
        return []
    found: list[Difference] = []
    for key in sorted((a.keys() | b.keys()) - _WRITTEN_BY_LIBRARIES):
        ours, theirs = a.get(key), b.get(key)
        name = f"{prefix}{key}"
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += config_differences(ours, theirs, f"{name}.")
        elif ours != theirs:
            found.append(Difference(f"config.json: {name}", None, str(ours)[:80], str(theirs)[:80]))
    return found


def verify(a: Path, b: Path) -> VerifyReport:
    """Compare two model folders (or run folders) of any readable layouts.

    Raises:
        FormatError: one of them is not readable, or wrong in itself. CheckpointError: it is no model folder.
    """
    return compare(read_model(resolve_model(a)), read_model(resolve_model(b)))


def compare(one: ModelContent, other: ModelContent) -> VerifyReport:
    """Compare two models, tensor by tensor; one of each side is in memory."""
    one, other = in_the_names_of(one, other), in_the_names_of(other, one)
    differences: list[Difference] = []
    num_codes = num_scales = num_values = 0
    linears = sorted(one.linears.keys() | other.linears.keys(), key=_by_layer)
    for name in linears:
        absent = _presence(name, one.linears, other.linears, "quantized")
        differences += [absent] if absent else [d for d in _linear_differences(name, one, other) if d is not None]
        entry = one.linears.get(name)
        if absent is None and entry is not None and entry.scheme is not None:
            num_codes += entry.out_features * entry.in_features
            num_scales += entry.out_features * entry.in_features // entry.scheme.group_size
    # A linear that only one side quantizes was named above; its dense twin on the other side is no second difference.
    quantized_weights = {f"{name}.weight" for name in linears}
    tensors = sorted((one.dense.keys() | other.dense.keys()) - quantized_weights, key=_by_layer)
    for name in tensors:
        found = _presence(name, one.dense, other.dense, "present")
        if found is None:
            mine = one.dense[name]
            num_values += mine.numel()
            found = compare_values(name, mine, other.dense[name])
        differences += [found] if found else []
    differences += config_differences(one.config, other.config)
    return VerifyReport(
        layout_a=one.layout,
        layout_b=other.layout,
        num_linears=len(linears),
        num_codes=num_codes,
        num_scales=num_scales,
        num_tensors=len(tensors),
        num_values=num_values,
        num_different=len(differences),
        first=differences[0] if differences else None,
    )


def verify_certificate(
    folder: Path, certificate: Path | None = None, progress: Progress | None = None
) -> tuple[str, list[str]]:
    """(root of the certificate, tensors of the folder that are not as it says, and other files that its manifest, where
    it has one, knows with another content).

    Args:
        certificate: a certificate file; None: the one that lies in the folder.

    Raises:
        FormatError: no certificate there, or a damaged one; a folder that is not readable.
    """
    source = resolve_model(folder)
    path = certificate or require_inside(source / CERTIFICATE)
    if not path.is_file():
        raise FormatError(f"{source} has no {CERTIFICATE}; name another folder or a certificate to compare with")
    stated = read_certificate(path)
    different = differing(stated, certify(read_model(source), progress))
    return stated["root"], different + [f"file {name}" for name in changed_files(source, _WEIGHT_FILES)]
