"""One protocol for every layout of a quantized model on a disk.

A converter reads a folder into a ``ModelContent`` (the same record whatever the layout: int8 codes, scales, scheme, and
the unquantized rest, each tensor read when it is asked for) and writes a ``ModelContent`` into a staging folder. So any
readable layout converts into any writable one, and ``verify`` compares any two. One layout is one file; ``registry.py``
lists them and finds the one of a folder by its content, never by its name.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grace_vlm.checkpoint.manifest import MANIFEST
from grace_vlm.errors import FormatError
from grace_vlm.formats.weights import require_inside
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme, ScaleRounding

CERTIFICATE = "grace-certificate.json"
_COMPANION_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".md"}
_COMPANION_NAMES = {"LICENSE", "NOTICE"}
_WRITTEN_BY_LAYOUTS = {"config.json", MANIFEST, CERTIFICATE, "awq_quantized_modules.json"}
_OF_OTHER_LAYOUTS = {"quantize_config.json", "adapter_config.json"}
"""AutoGPTQ's statement and PEFT's: beside other weights a loader would believe them."""


@dataclass(frozen=True)
class ModelContent:
    """A model as every layout can say it. The mappings read from the disk at each access.

    Args:
        layout: the name of the converter that read it.
        folder: where it was read; its tokenizer and processor files go along in a conversion.
        config: ``config.json`` without what the layout itself put there; empty if the folder has none.
        linears: the quantized linears in the order of the file, with shape and scheme.
        quantized: (codes, scale) of each of them.
        baked: the stored BF16 weight of each of them; empty if the layout stores codes only.
        dense: every other tensor, by its stock name.
        bf16_names: linears that are known to have no grid.
        companions: writes tokenizer and processor into a stage, where those of ``folder`` are not the ones to copy.
    """

    layout: str
    folder: Path
    config: dict[str, Any]
    linears: dict[str, PlanEntry]
    quantized: Mapping[str, QuantizedTensor]
    baked: Mapping[str, torch.Tensor]
    dense: Mapping[str, torch.Tensor]
    bf16_names: tuple[str, ...]
    companions: Callable[[Path], None] | None = None


class Converter(ABC):
    """One layout.

    ``name`` is what ``--format`` takes. ``scale_dtype`` is what the layout stores scales in; BF16 scales are exact in
    FP16 from 2^-17 to 65280, which holds what training makes. ``keeps_original_names``: a model in the original LLaVA
    layout is written as it is; others get Transformers' names.
    """

    name: str
    scale_dtype: torch.dtype = torch.float32
    keeps_original_names: bool = False

    @abstractmethod
    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Is ``folder``, whose configuration is ``config``, of this layout? Looks at content, not at names."""

    @abstractmethod
    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        """Why the layout cannot hold these quantized linears beside these dense tensors; None if it can.

        It needs names and schemes only, so a plan can be asked before anything is trained. Whether it holds the
        scales exactly is another question (``rounding.py``).
        """

    @abstractmethod
    def read(self, folder: Path) -> ModelContent:
        """Open a folder. Structure is checked now, each tensor when it is read; ``FormatError`` in either case."""

    @abstractmethod
    def write(self, content: ModelContent, stage: Path) -> None:
        """Write ``content``, whose scales are already what the layout stores, into an empty staging folder."""

    def stored_scale(self, scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
        """What reading gives back of a scale (out, groups) that this layout wrote, as values in FP32."""
        return scale.to(self.scale_dtype).float()

    def linear_bytes(self, entry: PlanEntry) -> int:
        """What one quantized linear takes on the disk, for the check of free space."""
        return int(entry.stored_bytes)

    def inspect(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """What ``grace inspect`` prints, JSON-able; ``progress`` is called with (weights done, weights in all)."""
        from grace_vlm.formats.inspect import inspect_content, linear_bytes

        content = self.read(folder)
        return inspect_content(content, linear_bytes(content), progress)

    def validate(self, folder: Path) -> ModelContent:
        """Read every tensor of a folder once; ``FormatError`` names the first that is wrong. Returns the content."""
        content = self.read(folder)
        for mapping in (content.quantized, content.baked, content.dense):
            for name in mapping:
                mapping[name]
        return content


def refuse(converter: Converter, content: ModelContent) -> None:
    """``FormatError`` if the layout cannot hold ``content``, or a runtime could not load it."""
    reason = converter.refusal(content.linears, content.dense)
    if reason is not None:
        raise FormatError(reason)


def neutral_scale(stored: torch.Tensor) -> tuple[torch.Tensor, ScaleRounding]:
    """(scale, rounding) of a scale as some file stores it: BF16 if that holds every value, else FP32."""
    narrow = stored.to(torch.bfloat16)
    if torch.equal(narrow.float(), stored.float()):
        return narrow, "bf16"
    return stored.float(), "fp32"


def write_config(stage: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` as Transformers does."""
    (stage / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(content: ModelContent, stage: Path) -> None:
    """Copy tokenizer, processor, generation settings and card. Never weights, code or pickles.

    Raises:
        FormatError: one of them is a link that leads out of the folder, or nowhere.
    """
    if content.companions is not None:
        content.companions(stage)
        return
    for path in sorted(content.folder.resolve().iterdir()):
        wanted = path.suffix in _COMPANION_SUFFIXES or path.name in _COMPANION_NAMES
        stays = path.name in _WRITTEN_BY_LAYOUTS | _OF_OTHER_LAYOUTS or path.name.endswith(".index.json")
        if not wanted or stays or path.name[0] == ".":
            continue
        require_inside(path)
        if path.is_file():
            shutil.copyfile(path, stage / path.name)
        elif path.is_symlink() and not path.exists():
            raise FormatError(f"{path} is a link to a file that is not there; copy or download the file again")
