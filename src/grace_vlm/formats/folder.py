"""Our own model folder: what stock loaders open, and beside it ``grid/``, where (codes, scale) lives.

    model.safetensors (or shards + index)        BF16, stock names; a quantized linear's weight is bf16(q * s)
    grid/codes-00001-of-00001.safetensors        <module>.codes int8 (out, in), <module>.scale (out, in / g) BF16|FP32
    grid/plan.json                               {"format_version": 1, "linears": [{"name", "scheme", "scale_rounding",
                                                  "out_features", "in_features"}, ...], "bf16": [names]}

Stock loaders never look into ``grid/``; nothing of ours ever divides a baked weight to get codes back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch

from grace_vlm.errors import CheckpointError, ConfigError, FormatError
from grace_vlm.formats.converter import Converter, ModelContent, copy_companions, write_config
from grace_vlm.formats.lazy import Lazy, TensorSpec, joined
from grace_vlm.formats.shards import INDEX, WEIGHTS, write_shards, write_weights
from grace_vlm.formats.weights import Weights, check_shard, open_weights, read_inside
from grace_vlm.quant.affine import bake
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme, ScaleRounding, parse_scheme

GRID = "grid"
START = "start"
"""Beside weights that are not rounded yet: what training may begin with (``grace quantize --for-training``)."""
PLAN_VERSION = 1
_CODES = re.compile(r"codes-[0-9]{5}-of-[0-9]{5}\.safetensors")
_ENTRY_KEYS = {"name", "scheme", "scale_rounding", "out_features", "in_features"}


def is_model_folder(path: Path) -> bool:
    """True if ``path`` has a configuration and safetensors weights, or GGUF files."""
    has_weights = (path / WEIGHTS).is_file() or (path / INDEX).is_file()
    return ((path / "config.json").is_file() and has_weights) or any(path.glob("*.gguf"))


def is_model(path: Path) -> bool:
    """A model folder, or the folder of a run that has one."""
    return is_model_folder(path) or is_model_folder(path / "final")


def resolve_model(path: Path) -> Path:
    """A model folder as it is; a run folder's ``final/``; ``CheckpointError`` for anything else."""
    for candidate in (path, path / "final"):
        if is_model_folder(candidate):
            return candidate
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a model folder or a run folder")
    raise CheckpointError(
        f"{path} is no model folder (config.json and {WEIGHTS}) and no run folder (final/); "
        "if it is a run, let it finish first"
    )


def scale_dtype(scheme: QuantScheme) -> torch.dtype:
    """What a scheme's scales are stored in."""
    return torch.float32 if scheme.scale_rounding == "fp32" else torch.bfloat16


def check_tensor(name: str, tensor: QuantizedTensor, entry: PlanEntry) -> QuantizedTensor:
    """``tensor`` itself, if it is what ``entry`` says; else ``FormatError``: dtype, shape, code range, scale."""
    scheme, codes, scale = tensor.scheme, tensor.codes, tensor.scale
    shape = (entry.out_features, entry.in_features)
    groups = (entry.out_features, entry.in_features // scheme.group_size)
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape:
        raise FormatError(f"{name}.codes is {codes.dtype} {tuple(codes.shape)}; expected torch.int8 {shape}")
    if scale.dtype != scale_dtype(scheme) or tuple(scale.shape) != groups:
        raise FormatError(
            f"{name}.scale is {scale.dtype} {tuple(scale.shape)}; expected {scale_dtype(scheme)} {groups}"
        )
    if codes.numel() and scheme.num_bits < 8 and not scheme.qmin <= int(codes.min()) <= int(codes.max()) <= scheme.qmax:
        raise FormatError(f"{name}.codes leaves [{scheme.qmin}, {scheme.qmax}], the range of {scheme.name}")
    if not bool((torch.isfinite(scale) & (scale != 0)).all()):
        raise FormatError(f"{name}.scale has a value that is zero or not finite")
    return tensor


def _plan_entry(where: Path, item: Any) -> PlanEntry:
    if not isinstance(item, dict) or item.keys() != _ENTRY_KEYS:
        raise FormatError(f"{where} has a linear {item!r}; expected exactly the keys {', '.join(sorted(_ENTRY_KEYS))}")
    name, rounding = item["name"], item["scale_rounding"]
    sizes = (item["out_features"], item["in_features"])
    if not isinstance(name, str) or rounding not in get_args(ScaleRounding) or not isinstance(item["scheme"], str):
        raise FormatError(f"{where} has a linear with a wrong name, scheme or scale_rounding: {item!r}")
    if any(type(size) is not int or size < 1 for size in sizes):
        raise FormatError(f"{where} says {name} is {sizes[0]!r} x {sizes[1]!r}; expected two positive integers")
    try:
        scheme = parse_scheme(item["scheme"], rounding)
        if scheme is None:
            raise FormatError(f"{where} lists {name} as bf16 among the quantized; it belongs under 'bf16'")
        scheme.check(*sizes, name)
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from error
    return PlanEntry(name, *sizes, scheme)


def read_plan(folder: Path, place: str = GRID) -> tuple[dict[str, PlanEntry], tuple[str, ...]]:
    """(quantized linears by name in model order, names of the linears in BF16) of ``grid/plan.json``."""
    where = folder / place / "plan.json"
    plan = read_inside(folder, f"{place}/plan.json")
    if plan.get("format_version") != PLAN_VERSION:
        raise FormatError(f"{where} has format_version {plan.get('format_version')!r}; this grace reads {PLAN_VERSION}")
    linears, bf16 = plan.get("linears"), plan.get("bf16")
    if not isinstance(linears, list) or not isinstance(bf16, list) or not all(isinstance(n, str) for n in bf16):
        raise FormatError(f"{where} needs two lists, 'linears' and 'bf16' (names)")
    entries = [_plan_entry(where, item) for item in linears]
    names = [entry.name for entry in entries] + bf16
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{where} lists {twice} twice")
    return {entry.name: entry for entry in entries}, tuple(bf16)


def _open_grid(folder: Path, entries: Mapping[str, PlanEntry], place: str) -> Weights:
    names = sorted(path.name for path in (folder / place).iterdir() if _CODES.fullmatch(path.name))
    if len({name[-len("00001.safetensors") :] for name in names} | {f"{len(names):05d}.safetensors"}) != 1:
        raise FormatError(
            f"{folder / place} holds {names or 'no codes'}; expected codes-00001-of-0000N.safetensors, all N"
        )
    weights = Weights(check_shard(folder / place, name, folder) for name in names)
    expected = {f"{name}.{part}" for name in entries for part in ("codes", "scale")}
    if weights.keys() != expected:
        odd = min(weights.keys() ^ expected)
        raise FormatError(f"{folder / place}: {odd} is {'not in the plan' if odd in weights else 'missing'}")
    return weights


def open_grid(folder: Path, place: str = GRID) -> tuple[dict[str, PlanEntry], tuple[str, ...], Lazy[QuantizedTensor]]:
    """(quantized linears, BF16 linears, checked tensors read when asked for) of a folder with a grid."""
    entries, bf16 = read_plan(folder, place)
    weights = _open_grid(folder, entries, place)

    def load(name: str) -> QuantizedTensor:
        scheme = entries[name].scheme
        assert scheme is not None
        return check_tensor(
            name, QuantizedTensor(weights[f"{name}.codes"], weights[f"{name}.scale"], scheme), entries[name]
        )

    return entries, bf16, Lazy(entries, load)


def read_grid(folder: Path) -> dict[str, QuantizedTensor]:
    """Every quantized linear of a model folder, in model order.

    Raises:
        FormatError: no grid, a plan that does not fit the tensors, a wrong dtype or shape, a code out of range, a
            scale that is zero or not finite.
    """
    if not (folder / GRID / "plan.json").is_file():
        raise FormatError(f"{folder} has no {GRID}/plan.json: it is not quantized (grace quantize makes one)")
    return dict(open_grid(folder)[2])


def _codes_name(number: int, count: int) -> str:
    return f"codes-{number:05d}-of-{count:05d}.safetensors"


def write_grid(
    folder: Path,
    tensors: Mapping[str, QuantizedTensor],
    bf16_names: tuple[str, ...],
    place: str = GRID,
    entries: Mapping[str, PlanEntry] | None = None,
) -> None:
    """Write ``folder/<place>``, a tensor at a time; ``folder`` is a stage that the caller publishes.

    Args:
        tensors: by module name, in model order.
        bf16_names: every linear without a grid.
        entries: shape and scheme of each, where they are known without reading the tensors.
    """
    if entries is None:
        entries = {name: PlanEntry(name, *tensor.shape, tensor.scheme) for name, tensor in tensors.items()}
    specs: dict[str, TensorSpec] = {}
    linears: list[dict[str, Any]] = []
    for name, entry in entries.items():
        scheme = entry.scheme
        assert scheme is not None
        specs[f"{name}.codes"] = TensorSpec(torch.int8, (entry.out_features, entry.in_features))
        groups = entry.in_features // scheme.group_size
        specs[f"{name}.scale"] = TensorSpec(scale_dtype(scheme), (entry.out_features, groups))
        linears.append(
            {
                "name": name,
                "scheme": scheme.name,
                "scale_rounding": scheme.scale_rounding,
                "out_features": entry.out_features,
                "in_features": entry.in_features,
            }
        )

    checked = lru_cache(maxsize=1)(lambda name: check_tensor(name, tensors[name], entries[name]))

    def load(key: str) -> torch.Tensor:
        name, _, part = key.rpartition(".")
        tensor = checked(name)
        return tensor.codes if part == "codes" else tensor.scale

    (folder / place).mkdir()
    write_shards(folder / place, Lazy(specs, load, specs.__getitem__), _codes_name)
    plan = {"format_version": PLAN_VERSION, "linears": linears, "bf16": list(bf16_names)}
    (folder / place / "plan.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


class ModelFolder(Converter):
    """The converter of our own layout; a BF16 model without a grid is one too."""

    name = "grace"

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "quantization_config" not in config and "qat" not in config

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        return None

    def linear_bytes(self, entry: PlanEntry) -> int:
        return entry.bf16_bytes + entry.bf16_bytes // 2 + 4 * entry.num_scales + 1024

    def read(self, folder: Path) -> ModelContent:
        config, weights = read_inside(folder, "config.json"), open_weights(folder)
        if not (folder / GRID).is_dir():
            return ModelContent(self.name, folder, config, {}, {}, {}, weights, ())
        entries, bf16, quantized = open_grid(folder)
        for name, entry in entries.items():
            weight, shape = f"{name}.weight", (entry.out_features, entry.in_features)
            if weight not in weights or weights.shape(weight) != shape:
                found = weights.shape(weight) if weight in weights else "missing"
                raise FormatError(f"{weight} of {folder} is {found}; expected {shape} as in {GRID}/plan.json")
        return ModelContent(
            layout=self.name,
            folder=folder,
            config=config,
            linears=entries,
            quantized=quantized,
            baked=stored_weights(entries, weights),
            dense=weights.only([n for n in weights if n.removesuffix(".weight") not in entries]),
            bf16_names=bf16,
        )

    def write(self, content: ModelContent, stage: Path) -> None:
        write_weights(stage, joined(content.dense, baked_weights(content)))
        write_grid(stage, content.quantized, content.bf16_names, entries=content.linears)
        write_config(stage, content.config)
        copy_companions(content, stage)


def stored_weights(
    entries: Mapping[str, PlanEntry], weights: Weights, load: Callable[[str], torch.Tensor] | None = None
) -> Lazy[torch.Tensor]:
    """The ``.weight`` of quantized linears as a file has them, by module."""
    return Lazy(entries, load or (lambda n: weights[f"{n}.weight"]), lambda n: weights.spec(f"{n}.weight"))


def baked_weights(content: ModelContent) -> Lazy[torch.Tensor]:
    """``<module>.weight``, bf16(q * s), of every quantized linear."""
    names = {f"{name}.weight": name for name in content.linears}

    def spec(key: str) -> TensorSpec:
        entry = content.linears[names[key]]
        return TensorSpec(torch.bfloat16, (entry.out_features, entry.in_features))

    return Lazy(names, lambda key: bake(content.quantized[names[key]]), spec)
