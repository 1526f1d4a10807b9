"""The official GRACE layout: BF16 safetensors and a pickle, ``qat_quantized_weights.bin``, beside them.

The pickle is a dict:

    <module>.weight      (out, in)           the fake-quantized weight, equal to the one in the safetensors
    <module>.log_scale   (out * groups,)     FP32; row after row
    <module>.bias        (out,)              if the linear has one

and ``config.json["qat"]`` is ``{"bits", "group_size", "skip_keywords", "num_replaced"}``, to which we add
``"scale_dtype"``: ``"bfloat16"`` says that exp(log_scale) is rounded to BF16. That gives back every BF16 scale, because
log_scale = float32(log(float64 s)) is far closer than half a BF16 step. FP32 scales do not survive the logarithm
(27 % do); they are read as the official code means them, and refused when written.

Codes are q = round(w / s), the one place where a baked weight is divided, because this layout has nothing else. Safe
for 8 bits and fewer: |q| <= 128 and BF16 keeps w within 2^-9 of q s, so the quotient is off by a quarter at most.
Reading checks each weight: with BF16 scales bf16(q * s) must be w again; with FP32 scales, whose exponential differs in
its last bit between machines, within one BF16 step.

This is the only file of the product that opens a pickle: ``weights_only``, after the zip directory was found to hold
uncompressed entries that add up to the file, with a cap from the safetensors beside it, and a strict schema after.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import ConfigError, FormatError
from grace_vlm.formats.converter import Lazy, ModelContent, copy_companions, refuse, summary, write_config
from grace_vlm.formats.folder import check_tensor
from grace_vlm.formats.weights import Weights, linears_among, open_weights, write_weights
from grace_vlm.quant.affine import bake, to_groups
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

SIDECAR = "qat_quantized_weights.bin"
_ROOM_BYTES = 64 << 20
_SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_UNPICKLING = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OSError,
    OverflowError,
)


def log_of_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32(log(float64 s)), flat."""
    return scale.to(torch.float64).log().to(torch.float32).reshape(-1)


def scale_of_log(log_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp(log_scale), formed in FP64 and rounded once to ``dtype``."""
    return log_scale.to(torch.float64).exp().to(dtype)


def _check_archive(path: Path, max_bytes: int) -> None:
    """Refuse what could unpack to more than is on the disk, before anything is unpacked."""
    size = path.stat().st_size
    if size > max_bytes:
        raise FormatError(f"{path} has {size:,} bytes; the model's weights allow at most {max_bytes:,}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FormatError(f"{path} is no torch archive: {error}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FormatError(f"{path} holds compressed entries, which torch.save never writes; it is not opened")
    if sum(entry.file_size for entry in entries) > size:
        raise FormatError(f"{path} claims more content than it has bytes; it is not opened")


def read_sidecar(path: Path, max_bytes: int) -> dict[str, torch.Tensor]:
    """The pickle's dict, with nothing in it but plain CPU tensors under ``<module>.{weight,log_scale,bias}``.

    Raises:
        FormatError: too large, compressed, not loadable with ``weights_only``, or anything beyond the schema.
    """
    _check_archive(path, max_bytes)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNPICKLING as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path} is refused by torch.load(weights_only=True): {reason}") from error
    if type(found) is not dict or not found:
        raise FormatError(f"{path} holds a {type(found).__name__}; expected a dict of tensors")
    for name, tensor in found.items():
        part = name.rpartition(".")[2] if isinstance(name, str) else ""
        plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.is_contiguous()
        if part not in ("weight", "log_scale", "bias") or not plain:
            raise FormatError(
                f"{path} holds {name!r} ({type(tensor).__name__}); expected plain <module>.weight, .log_scale"
            )
    return found


def _read_settings(folder: Path, config: dict[str, Any]) -> tuple[QuantScheme, torch.dtype]:
    """(scheme, dtype of the scales) of ``config.json["qat"]``, which is taken out of ``config``."""
    stated = config.pop("qat", None)
    if not isinstance(stated, dict):
        raise FormatError(f"{folder / 'config.json'} has no 'qat' section; expected bits and group_size there")
    bits, size, rounded = stated.get("bits"), stated.get("group_size"), stated.get("scale_dtype", "float32")
    if type(bits) is not int or bits not in (2, 3, 4, 8) or type(size) is not int or size < 1:
        raise FormatError(
            f"{folder}: qat says bits {bits!r}, group_size {size!r}; expected 2, 3, 4 or 8 bits and a size"
        )
    if rounded not in _SCALE_DTYPES:
        raise FormatError(f"{folder}: qat says scale_dtype {rounded!r}; expected one of {', '.join(_SCALE_DTYPES)}")
    return QuantScheme(bits, size, "bf16" if rounded == "bfloat16" else "fp32"), _SCALE_DTYPES[rounded]


def _recover(name: str, weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """(codes, scale) of a baked weight; ``FormatError`` if they do not bake to it again."""
    ratio = to_groups(weight.to(torch.float64), scheme.group_size) / scale.to(torch.float64).unsqueeze(-1)
    codes = ratio.round().reshape(weight.shape)
    if not bool(((codes >= scheme.qmin) & (codes <= scheme.qmax)).all()):
        raise FormatError(f"{name}.weight / scale leaves [{scheme.qmin}, {scheme.qmax}], the range of {scheme.name}")
    tensor = QuantizedTensor(codes.to(torch.int8), scale, scheme)
    again = bake(tensor)
    if scheme.scale_rounding == "fp32":
        on_grid = bool(((again.float() - weight.float()).abs() <= 2.0**-7 * weight.float().abs()).all())
    else:
        on_grid = torch.equal(again, weight)
    if not on_grid:
        raise FormatError(f"{name}.weight is not on the grid of its scales; expected bf16(q * exp(log_scale))")
    return tensor


def _entry(
    folder: Path, weights: Weights, sidecar: Mapping[str, torch.Tensor], name: str, scheme: QuantScheme
) -> PlanEntry:
    """Shape of a quantized linear, after the sidecar's tensors were found to fit the safetensors' and the scheme."""
    key = f"{name}.weight"
    if key not in sidecar or key not in weights or len(weights.shape(key)) != 2:
        raise FormatError(
            f"{folder}: {SIDECAR} has {name}.log_scale, but {key} is not a matrix in it and the safetensors"
        )
    out_features, in_features = weights.shape(key)
    weight, log_scale = sidecar[key], sidecar[f"{name}.log_scale"]
    if weight.dtype != torch.bfloat16 or tuple(weight.shape) != (out_features, in_features):
        raise FormatError(
            f"{folder}: {key} is {weight.dtype} {tuple(weight.shape)} in {SIDECAR}; "
            f"expected torch.bfloat16 {(out_features, in_features)} as in the safetensors"
        )
    try:
        scheme.check(out_features, in_features, name)
    except ConfigError as error:
        raise FormatError(
            f"{folder}: {error}; the official code then uses one scale a row, which we do not read"
        ) from error
    expected = out_features * (in_features // scheme.group_size)
    if log_scale.dtype != torch.float32 or tuple(log_scale.shape) != (expected,):
        raise FormatError(
            f"{folder}: {name}.log_scale is {log_scale.dtype} {tuple(log_scale.shape)}; "
            f"expected torch.float32 ({expected},)"
        )
    return PlanEntry(name, out_features, in_features, scheme)


class Official:
    """The converter; see the head of the file."""

    name = "official"

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "qat" in config and (folder / SIDECAR).is_file() and "quantization_config" not in config

    def inspect(self, folder: Path) -> dict[str, Any]:
        return summary(self.read(folder))

    def read(self, folder: Path) -> ModelContent:
        config, weights = read_object(folder / "config.json", FormatError), open_weights(folder)
        scheme, scale_dtype = _read_settings(folder, config)
        stored_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        sidecar = read_sidecar(folder / SIDECAR, 2 * stored_bytes + _ROOM_BYTES)
        names = [name.removesuffix(".log_scale") for name in sidecar if name.endswith(".log_scale")]
        entries = {name: _entry(folder, weights, sidecar, name, scheme) for name in names}
        stray = next((n for n in sidecar if n.rpartition(".")[0] not in entries), None)
        if stray is not None:
            raise FormatError(f"{folder / SIDECAR} has {stray} but no log_scale for it")

        def baked(name: str) -> torch.Tensor:
            for part in ("weight", "bias"):
                key = f"{name}.{part}"
                if key not in sidecar:
                    continue
                if key not in weights or not torch.equal(sidecar[key], weights[key].to(sidecar[key].dtype)):
                    raise FormatError(f"{folder}: {key} differs between {SIDECAR} and the safetensors")
            return weights[f"{name}.weight"]

        def load(name: str) -> QuantizedTensor:
            groups = (entries[name].out_features, entries[name].in_features // scheme.group_size)
            scale = scale_of_log(sidecar[f"{name}.log_scale"], scale_dtype).reshape(groups)
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise FormatError(f"{name}.log_scale has a value whose exponential is not finite and positive")
            return check_tensor(name, _recover(name, baked(name), scale, scheme), entries[name])

        dense = [name for name in weights if name.removesuffix(".weight") not in entries]
        return ModelContent(
            layout=self.name,
            folder=folder,
            config=config,
            linears=entries,
            quantized=Lazy(entries, load),
            baked=Lazy(entries, baked),
            dense=Lazy(dense, weights.__getitem__),
            bf16_names=linears_among(weights, dense),
        )

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        grids = sorted({entry.scheme.name for entry in linears.values() if entry.scheme})
        if len(grids) != 1:
            return f"the official layout has one scheme for the whole model; this one has {', '.join(grids)}"
        return None

    def write(self, content: ModelContent, stage: Path) -> None:
        refuse(self, content)
        scheme = next(entry.scheme for entry in content.linears.values() if entry.scheme)
        sidecar: dict[str, torch.Tensor] = {}
        for name, tensor in content.quantized.items():
            log_scale = log_of_scale(tensor.scale)
            if not torch.equal(scale_of_log(log_scale, torch.bfloat16), tensor.scale.reshape(-1)):
                raise FormatError(
                    f"{name} has FP32 scales, which do not survive the logarithm of the official layout; "
                    "train or quantize with scale_rounding=bf16"
                )
            sidecar[f"{name}.weight"] = bake(tensor)
            sidecar[f"{name}.log_scale"] = log_scale
            if f"{name}.bias" in content.dense:
                sidecar[f"{name}.bias"] = content.dense[f"{name}.bias"]

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from content.dense.items()
            for name in content.quantized:
                yield f"{name}.weight", sidecar[f"{name}.weight"]

        write_weights(stage, tensors())
        torch.save(sidecar, stage / SIDECAR)
        others = [n for n in content.bf16_names if "visual" not in n and "lm_head" not in n]
        settings = {
            "bits": scheme.num_bits,
            "group_size": scheme.group_size,
            "skip_keywords": ["visual", "lm_head", *others],
            "num_replaced": len(content.linears),
            "scale_dtype": "bfloat16",
        }
        write_config(stage, {**content.config, "qat": settings})
        copy_companions(content.folder, stage)
