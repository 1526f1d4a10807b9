"""One protocol for every layout of a quantized model on a disk.

A converter reads a folder into a ``ModelContent`` (the same record whatever the layout) and writes a ``ModelContent``
into a staging folder. So any readable layout converts into any writable one, and ``verify`` compares any two. One
layout is one file; ``registry.py`` lists them and finds the one of a folder by its content, never by its name.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from grace_vlm.checkpoint.manifest import MANIFEST
from grace_vlm.errors import FormatError
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor

T = TypeVar("T")
_COMPANION_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".md"}
_COMPANION_NAMES = {"LICENSE", "NOTICE"}


class Lazy(Mapping[str, T], Generic[T]):
    """A read-only mapping with known names whose values are loaded at each access."""

    def __init__(self, names: Iterable[str], load: Callable[[str], T]) -> None:
        self._names, self._load = dict.fromkeys(names), load

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


@dataclass(frozen=True)
class ModelContent:
    """A model as every layout can say it. The mappings read from the disk at each access.

    Args:
        layout: the name of the converter that read it.
        folder: where it was read; its tokenizer and processor files go along in a conversion.
        config: ``config.json`` without what the layout itself put there.
        linears: the quantized linears in the order of the file, with shape and scheme.
        quantized: (codes, scale) of each of them.
        baked: the stored BF16 weight of each of them; empty if the layout stores codes only.
        dense: every other tensor, by its stock name.
        bf16_names: linears that are known to have no grid.
    """

    layout: str
    folder: Path
    config: dict[str, Any]
    linears: dict[str, PlanEntry]
    quantized: Mapping[str, QuantizedTensor]
    baked: Mapping[str, torch.Tensor]
    dense: Mapping[str, torch.Tensor]
    bf16_names: tuple[str, ...]


class Converter(Protocol):
    """One layout."""

    name: str

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Is ``folder``, whose configuration is ``config``, of this layout? Looks at content, not at names."""
        ...

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        """Why the layout cannot hold these quantized linears beside these dense tensors exactly; None if it can.

        It needs names and schemes only, so a plan can be asked before anything is trained.
        """
        ...

    def inspect(self, folder: Path) -> dict[str, Any]:
        """What ``grace inspect`` prints, JSON-able."""
        ...

    def read(self, folder: Path) -> ModelContent:
        """Open a folder. Structure is checked now, each tensor when it is read; ``FormatError`` in either case."""
        ...

    def write(self, content: ModelContent, stage: Path) -> None:
        """Write ``content`` into an empty staging folder; ``FormatError`` if the layout cannot hold it exactly."""
        ...


def refuse(converter: Converter, content: ModelContent) -> None:
    """``FormatError`` if the layout cannot hold ``content`` exactly, or a runtime could not load it."""
    reason = converter.refusal(content.linears, content.dense)
    if reason is not None:
        raise FormatError(reason)


def summary(content: ModelContent) -> dict[str, Any]:
    """Layout, schemes, counts, bytes on disk and bits per weight of the quantized linears."""
    schemes = Counter(entry.scheme.name for entry in content.linears.values() if entry.scheme)
    num_weights = sum(entry.out_features * entry.in_features for entry in content.linears.values())
    stored_bytes = sum(entry.stored_bytes for entry in content.linears.values())
    return {
        "layout": content.layout,
        "model_type": content.config.get("model_type"),
        "schemes": dict(schemes),
        "quantized_linears": len(content.linears),
        "quantized_weights": num_weights,
        "bits_per_quantized_weight": round(8 * stored_bytes / num_weights, 4) if num_weights else None,
        "other_tensors": len(content.dense),
        "bytes_on_disk": sum(path.stat().st_size for path in content.folder.rglob("*") if path.is_file()),
    }


def write_config(stage: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` as Transformers does."""
    (stage / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, stage: Path) -> None:
    """Copy tokenizer, processor, generation settings and card. Never weights, code or pickles."""
    for path in sorted(source.resolve().iterdir()):
        wanted = path.suffix in _COMPANION_SUFFIXES or path.name in _COMPANION_NAMES
        ours = path.name in ("config.json", MANIFEST) or path.name.endswith(".index.json")
        if wanted and not ours and path.is_file() and path.parent == path.resolve().parent and path.name[0] != ".":
            shutil.copyfile(path, stage / path.name)
