"""What the packed layouts have in common: safetensors in which a few tensors stand for a quantized linear's weight.

A layout says which tensors those are (``parts``), how they are made from a grid (``encode``) and read back
(``decode``), and what it writes into ``config.json``. Names, shapes, dtypes and streaming are dealt with here. Scales
are read in whatever floating dtype they have, since foreign packers differ; they are written in the layout's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import Converter, ModelContent, copy_companions, neutral_scale, refuse, write_config
from grace_vlm.formats.folder import check_tensor
from grace_vlm.formats.lazy import Lazy, TensorSpec, joined
from grace_vlm.formats.shards import shard_bytes, write_weights
from grace_vlm.formats.weights import Weights, linears_among, open_weights, read_inside
from grace_vlm.quant.packing import codes_per_word
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

Grid = tuple[int, int]
"""(num_bits, group_size)."""
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def split_fused_group(linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
    """Why vLLM, which fuses q, k, v and gate, up, could not load these linears; None if every group has one scheme."""
    for name, entry in linears.items():
        assert entry.scheme is not None
        parent, _, leaf = name.rpartition(".")
        for group in (group for group in _FUSED if leaf in group):
            for other in (f"{parent}.{member}" for member in group):
                found = linears[other].scheme if other in linears else None
                exists = found is not None or f"{other}.weight" in dense_names
                if exists and (found is None or found.name != entry.scheme.name):
                    return (
                        f"{name} is {entry.scheme.name} but {other} is {found.name if found else 'bf16'}; "
                        f"vLLM fuses {', '.join(group)}: give them one scheme"
                    )
    return None


def one_grid(layout: str, linears: Mapping[str, PlanEntry]) -> Grid:
    """The grid that all linears have; ``FormatError`` if there are two."""
    grids = {(e.scheme.num_bits, e.scheme.group_size): e.scheme.name for e in linears.values() if e.scheme}
    if len(grids) != 1:
        raise FormatError(f"{layout} holds one scheme for the whole model; this one has {_listed(grids.values())}")
    return next(iter(grids))


def refuse_beyond_decoder(
    layout: str, linears: Mapping[str, PlanEntry], bits: tuple[int, ...], dense_names: Container[str]
) -> str | None:
    """Why a layout of one scheme, decoder linears and ``bits`` alone cannot hold ``linears``; None if it can."""
    try:
        num_bits, _ = one_grid(layout, linears)
    except FormatError as error:
        return str(error)
    for name, entry in linears.items():
        assert entry.scheme is not None
        if num_bits not in bits:
            held = " or ".join(f"w{b}" for b in bits)
            return f"{name} is {entry.scheme.name}; {layout} holds {held} only: quantize to w{bits[0]}g128"
        if name.endswith("embed_tokens") or name.rpartition(".")[2] == "lm_head":
            return f"{name} has a grid; {layout} packs the decoder's linears: leave quant.head in bf16, or use gguf"
        if any(part in name.split(".") for part in DENSE_PARTS):
            return f"{name} has a grid; {layout} packs the decoder's linears: leave quant.tower and .projector in bf16"
        for size, what in ((entry.out_features, "out_features"), (entry.in_features, "in_features")):
            if size % codes_per_word(num_bits):
                return f"{name} has {what} {size}; {layout} needs multiples of {codes_per_word(num_bits)}"
    return split_fused_group(linears, dense_names)


DENSE_PARTS = ("visual", "vision_tower", "multi_modal_projector", "lm_head")
"""Modules, in the names of any runtime, that these layouts leave in BF16 as a whole."""


def dense_modules(content: ModelContent) -> tuple[list[str], list[str]]:
    """(whole parts, single linears below ``layers.N``) that a runtime must be told to leave dense."""
    names = [name.removesuffix(".weight") for name in content.dense]
    parts = [part for part in DENSE_PARTS if part == "lm_head" or any(part in name.split(".") for name in names)]
    single = [name for name in content.bf16_names if not any(part in name.split(".") for part in DENSE_PARTS)]
    # A decoder layer is "layers.N" in every name space; what stands before it is not.
    return parts, [name[name.index("layers.") :] if "layers." in name else name for name in single]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


class PackedLayout(Converter):
    """A layout whose quantized linears are a few tensors each; see the head of the file.

    ``marker`` is the part that only quantized linears have, ``scale_part`` the one that holds the scales.
    """

    marker: str
    scale_part: str

    @abstractmethod
    def take_statement(self, folder: Path, config: dict[str, Any]) -> list[Grid]:
        """The grids that the folder states; takes the layout's own keys out of ``config``."""

    @abstractmethod
    def statement(self, content: ModelContent) -> dict[str, Any]:
        """What ``config.json`` gets."""

    @abstractmethod
    def parts(self, entry: PlanEntry) -> dict[str, TensorSpec]:
        """Name, dtype and shape of the tensors that stand for ``entry``."""

    @abstractmethod
    def features(self, name: str, weights: Weights, grid: Grid) -> tuple[int, int] | None:
        """(out, in) of a packed linear if its tensors have the rank and size of ``grid``; None if not."""

    @abstractmethod
    def encode(self, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The parts of a linear."""

    @abstractmethod
    def decode(self, name: str, parts: Mapping[str, torch.Tensor], entry: PlanEntry) -> torch.Tensor:
        """Codes (out, in) int8; ``FormatError`` for zero points or an order of inputs that our grid does not have."""

    def scale_of(self, stored: torch.Tensor) -> torch.Tensor:
        """(out, groups) from the part that holds the scales."""
        return stored

    def linear_bytes(self, entry: PlanEntry) -> int:
        return shard_bytes(self.parts(entry).values())

    def read(self, folder: Path) -> ModelContent:
        config, weights = read_inside(folder, "config.json"), open_weights(folder)
        grids = self.take_statement(folder, config)
        ending = f".{self.marker}"
        names = [name.removesuffix(ending) for name in weights if name.endswith(ending)]
        if not names:
            raise FormatError(f"{folder} states {self.name} but holds no <linear>.{self.marker}")
        scales: dict[str, torch.Tensor] = {}
        entries = {name: self._entry(folder, weights, name, grids, scales) for name in names}
        if any(scale.dtype == torch.float32 for scale in scales.values()):  # one rounding for the whole model
            scales = {name: scale.float() for name, scale in scales.items()}
            entries = {
                n: replace(e, scheme=replace(e.scheme, scale_rounding="fp32")) for n, e in entries.items() if e.scheme
            }
        taken = {f"{name}.{part}" for name, entry in entries.items() for part in self.parts(entry)}
        dense = [name for name in weights if name not in taken]
        self._refuse_strays(folder, dense, entries)

        def load(name: str) -> QuantizedTensor:
            entry = entries[name]
            assert entry.scheme is not None
            parts = Lazy(self.parts(entry), lambda part: weights[f"{name}.{part}"])
            return check_tensor(
                name, QuantizedTensor(self.decode(name, parts, entry), scales[name], entry.scheme), entry
            )

        return ModelContent(
            layout=self.name,
            folder=folder,
            config=config,
            linears=entries,
            quantized=Lazy(entries, load),
            baked={},
            dense=weights.only(dense),
            bf16_names=linears_among(weights, dense),
        )

    def _refuse_strays(self, folder: Path, dense: Iterable[str], entries: Mapping[str, PlanEntry]) -> None:
        """A part without its linear, or a part that the layout does not know, is never passed on as a dense tensor."""
        own = set(self.parts(next(iter(entries.values())))) - {"weight"}
        for name in dense:
            module, _, part = name.rpartition(".")
            if part in own or part.startswith("weight_") or (module in entries and part != "bias"):
                raise FormatError(f"{folder} has {name}, which is no tensor of a {self.name} linear of ours")

    def _entry(
        self, folder: Path, weights: Weights, name: str, grids: list[Grid], scales: dict[str, torch.Tensor]
    ) -> PlanEntry:
        """Shape and scheme of a packed linear from its own tensors, checked against what the folder states."""
        for num_bits, group_size in grids:
            shape = self.features(name, weights, (num_bits, group_size))
            if shape is None or min(shape) < 1 or shape[1] % group_size:
                continue
            expected = self.parts(PlanEntry(name, *shape, QuantScheme(num_bits, group_size)))
            if all(self._fits(weights, f"{name}.{part}", spec, part) for part, spec in expected.items()):
                scale, rounding = neutral_scale(self.scale_of(weights[f"{name}.{self.scale_part}"]))
                scales[name] = scale
                return PlanEntry(name, *shape, QuantScheme(num_bits, group_size, rounding))
        shapes = ", ".join(
            f"{key.rpartition('.')[2]} {weights.spec(key).dtype} {weights.shape(key)}"
            for key in sorted(weights)
            if key.rpartition(".")[0] == name
        )
        stated = _listed(f"w{bits}g{size}" for bits, size in grids)
        raise FormatError(f"{folder}: {name} has {shapes}; that fits no {self.name} linear of {stated}")

    def _fits(self, weights: Weights, key: str, spec: TensorSpec, part: str) -> bool:
        if key not in weights:
            return False
        found = weights.spec(key)
        dtypes = _SCALE_DTYPES if part == self.scale_part else (spec.dtype,)
        return found.shape == spec.shape and found.dtype in dtypes

    def write(self, content: ModelContent, stage: Path) -> None:
        refuse(self, content)
        specs = {
            f"{name}.{part}": spec
            for name, entry in content.linears.items()
            for part, spec in self.parts(entry).items()
        }
        # The parts of a linear are asked for one after the other.
        encoded = lru_cache(maxsize=1)(lambda name: self.encode(content.quantized[name]))

        def load(key: str) -> torch.Tensor:
            name, _, part = key.rpartition(".")
            return encoded(name)[part]

        write_weights(stage, joined(content.dense, Lazy(specs, load, specs.__getitem__)))
        write_config(stage, {**content.config, **self.statement(content)})
        copy_companions(content, stage)


def stated_grid(folder: Path, section: str, bits: Any, group_size: Any) -> Grid:
    """A (num_bits, group_size) that a configuration states; ``FormatError`` unless 4 or 8 bits and a positive size."""
    if type(bits) is not int or bits not in (4, 8) or type(group_size) is not int or not 1 <= group_size < 1 << 31:
        raise FormatError(
            f"{folder}: {section} says bits {bits!r}, group_size {group_size!r}; expected 4 or 8 bits and a size"
        )
    return bits, group_size
