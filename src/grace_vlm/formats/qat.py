"""The official GRACE layout: BF16 safetensors on the grid and a pickle, ``qat_quantized_weights.bin``, beside them.

The pickle (sidecar.py) is a dict:

    <module>.weight      (out, in)           the fake-quantized weight, equal to the one in the safetensors
    <module>.log_scale   (out * groups,)     FP32; row after row; the group is out * in / len
    <module>.bias        (out,)              if the linear has one

and ``config.json["qat"]`` is ``{"bits", "group_size", "skip_keywords", "num_replaced"}``, to which we add
``"scale_dtype"``: ``"bfloat16"`` says that exp(log_scale) is rounded to BF16. That gives back every BF16 scale, because
log_scale = float32(log(float64 s)) is far closer than half a BF16 step. Without it exp(log_scale) stays FP32, as the
official code means it. Of all FP32 scales 27 % survive the logarithm: those that came from such a file do, others are
rounded to what the file will give back (``stored_scale``).

Where nothing states the bits, max |q| of the whole model does: 7 or 8 is 4 bits, more is 8 bits, less is refused.

Codes are q = round(w / s), the one place where a baked weight is divided, because this layout has nothing else. Safe
for 8 bits and fewer: |q| <= 128 and BF16 keeps w within 2^-9 of q s, so the quotient is off by a quarter at most.
Reading checks each weight: with BF16 scales bf16(q * s) must be w again; with FP32 scales, whose exponential differs in
its last bit between machines, within one BF16 step.

Names and configuration stay those of the folder, also of the original LLaVA layout (``llava_original.py``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import Converter, ModelContent, copy_companions, refuse, write_config
from grace_vlm.formats.folder import baked_weights, check_tensor
from grace_vlm.formats.lazy import Lazy, TensorSpec, joined
from grace_vlm.formats.packed import one_grid
from grace_vlm.formats.shards import write_weights
from grace_vlm.formats.sidecar import SIDECAR, Sidecar, read_sidecar, write_sidecar
from grace_vlm.formats.values import digest
from grace_vlm.formats.weights import Weights, linears_among, open_weights, read_inside, require_inside
from grace_vlm.quant.affine import bake, row_blocks, to_groups
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme, ScaleRounding

_ROOM_BYTES = 64 << 20
_SCALE_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_BITS = (2, 3, 4, 8)


def log_of_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32(log(float64 s)), flat."""
    return scale.to(torch.float64).log().to(torch.float32).reshape(-1)


def scale_of_log(log_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp(log_scale), formed in FP64 and rounded once to ``dtype``, so that it is the same on every machine."""
    return log_scale.to(torch.float64).exp().to(dtype)


def _read_settings(folder: Path, config: dict[str, Any]) -> tuple[int | None, int | None, torch.dtype | None]:
    """(bits, group size, dtype of the scales) of ``config.json["qat"]``, None what it does not say; taken out of it."""
    stated = config.pop("qat", {})
    if not isinstance(stated, dict):
        raise FormatError(f"{folder / 'config.json'} has a 'qat' section that is no object")
    bits, size, rounded = stated.get("bits"), stated.get("group_size"), stated.get("scale_dtype")
    if bits is not None and (type(bits) is not int or bits not in _BITS):
        raise FormatError(f"{folder}: qat says bits {bits!r}; expected 2, 3, 4 or 8")
    if size is not None and (type(size) is not int or size < 1):
        raise FormatError(f"{folder}: qat says group_size {size!r}; expected a positive number")
    if rounded is not None and (not isinstance(rounded, str) or rounded not in _SCALE_DTYPES):
        raise FormatError(f"{folder}: qat says scale_dtype {rounded!r}; expected one of {', '.join(_SCALE_DTYPES)}")
    return bits, size, _SCALE_DTYPES[rounded] if rounded else None


def _ratio(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """w / s in FP32, (out, in): off by 128 x 2^-23, where codes of the grid need a quarter."""
    groups = to_groups(weight.float(), weight.shape[1] // scale.shape[1])
    return (groups / scale.float().unsqueeze(-1)).reshape(weight.shape)


def _recover(name: str, weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """(codes, scale) of a baked weight; ``FormatError`` if they do not bake to it again."""
    parts = [_recover_rows(name, weight[rows], scale[rows], scheme) for rows in row_blocks(weight)]
    return QuantizedTensor(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]), scheme)


def _recover_rows(name: str, weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    codes = _ratio(weight, scale).round()
    if not bool(((codes >= scheme.qmin) & (codes <= scheme.qmax)).all()):
        raise FormatError(f"{name}.weight / scale leaves [{scheme.qmin}, {scheme.qmax}], the range of {scheme.name}")
    tensor = QuantizedTensor(codes.to(torch.int8), scale, scheme)
    if scheme.scale_rounding == "fp32":
        tensor = _with_their_exponential(tensor, weight)
    again = bake(tensor)
    if scheme.scale_rounding == "fp32":
        on_grid = bool(((again.float() - weight.float()).abs() <= 2.0**-7 * weight.float().abs()).all())
    else:
        on_grid = torch.equal(again, weight)
    if not on_grid:
        raise FormatError(f"{name}.weight is not on the grid of its scales; expected bf16(q * exp(log_scale))")
    return tensor


def _with_their_exponential(tensor: QuantizedTensor, weight: torch.Tensor) -> QuantizedTensor:
    """``tensor`` with scales moved by up to two FP32 steps, where that and only that gives back the stored weights.

    exp in FP32 is off by a step or two, where depends on the machine; so now and then bf16(q * s) is a neighbour of the
    weight that was released.
    """
    size = tensor.scheme.group_size
    wanted = to_groups(weight, size)

    def wrong_with(scale: torch.Tensor) -> torch.Tensor:
        return (to_groups(bake(QuantizedTensor(tensor.codes, scale, tensor.scheme)), size) != wanted).any(-1)

    scale, wrong = tensor.scale, wrong_with(tensor.scale)
    for steps in (1, -1, 2, -2):
        if not bool(wrong.any()):
            break
        moved = tensor.scale
        for _ in range(abs(steps)):
            moved = torch.nextafter(moved, torch.full_like(moved, torch.inf if steps > 0 else 0.0))
        repaired = wrong & ~wrong_with(moved)
        scale, wrong = torch.where(repaired, moved, scale), wrong & ~repaired
    return QuantizedTensor(tensor.codes, scale, tensor.scheme)


def _group_size(folder: Path, weights: Weights, sidecar: Sidecar, name: str, stated: int | None) -> int:
    """The group of one linear, after the sidecar's tensors were found to fit the safetensors'."""
    key = f"{name}.weight"
    if name not in sidecar.weights or key not in weights or len(weights.shape(key)) != 2:
        raise FormatError(
            f"{folder}: {SIDECAR} has {name}.log_scale, but {key} is not a matrix in it and the safetensors"
        )
    spec, log_scale = weights.spec(key), sidecar.log_scales[name]
    if sidecar.weights[name][0].shape != spec.shape or spec.dtype != torch.bfloat16:
        raise FormatError(
            f"{folder}: {key} is {sidecar.weights[name][0].shape} in {SIDECAR} and {spec.dtype} {spec.shape} in the "
            "safetensors; expected the same torch.bfloat16 matrix"
        )
    out_features, in_features = spec.shape
    num_scales = log_scale.numel()
    if log_scale.ndim != 1 or log_scale.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(
            f"{folder}: {name}.log_scale is {log_scale.dtype} {tuple(log_scale.shape)}; expected FP32, flat"
        )
    if num_scales < out_features or num_scales % out_features or in_features % (num_scales // out_features):
        raise FormatError(
            f"{folder}: {name}.log_scale has {num_scales} values; {out_features} x {in_features} weights need a whole "
            "number of equal groups a row"
        )
    size = out_features * in_features // num_scales
    # The official code gives a row one scale, without a word, if its group size does not divide the row.
    if stated is not None and stated != size and (num_scales != out_features or in_features % stated == 0):
        raise FormatError(f"{folder}: qat says group_size {stated}, the log_scale of {name} {size}; they must agree")
    return size


class Official(Converter):
    """The converter; see the head of the file."""

    name = "official"
    keeps_original_names = True

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return (folder / SIDECAR).is_file() and "quantization_config" not in config

    def read(self, folder: Path) -> ModelContent:
        config, weights = read_inside(folder, "config.json"), open_weights(folder)
        bits, stated_size, scale_dtype = _read_settings(folder, config)
        stored_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
        sidecar = read_sidecar(require_inside(folder / SIDECAR), 2 * stored_bytes + _ROOM_BYTES)
        if stray := sorted((sidecar.weights.keys() | sidecar.biases.keys()) - sidecar.log_scales.keys()):
            raise FormatError(f"{folder / SIDECAR} has tensors of {stray[0]} but no log_scale for it")
        groups = {name: _group_size(folder, weights, sidecar, name, stated_size) for name in sidecar.log_scales}
        if not groups:
            raise FormatError(f"{folder / SIDECAR} holds no <module>.log_scale, so the model has no grid")

        def scale_of(name: str) -> torch.Tensor:
            log_scale = sidecar.log_scales[name]
            # Log-scales in BF16 are those of a run whose parameters were BF16: their exponential was too.
            scale = scale_of_log(log_scale, scale_dtype or log_scale.dtype)
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise FormatError(f"{name}.log_scale has a value whose exponential is not finite and positive")
            return scale.reshape(weights.shape(f"{name}.weight")[0], -1)

        def baked(name: str) -> torch.Tensor:
            weight, bias = weights[f"{name}.weight"], f"{name}.bias"
            if digest(weight) != sidecar.weights[name][1]:
                raise FormatError(f"{folder}: {name}.weight differs between {SIDECAR} and the safetensors")
            if name in sidecar.biases and (
                bias not in weights or digest(weights[bias]) != digest(sidecar.biases[name])
            ):
                raise FormatError(f"{folder}: {bias} differs between {SIDECAR} and the safetensors")
            return weight

        if bits is None:
            bits = _bits_of_codes(folder, (_ratio(weights[f"{n}.weight"], scale_of(n)).round() for n in groups))
        entries = {}
        for name, size in groups.items():
            dtype = scale_dtype or sidecar.log_scales[name].dtype
            rounding: ScaleRounding = "bf16" if dtype == torch.bfloat16 else "fp32"
            out_features, in_features = weights.shape(f"{name}.weight")
            entries[name] = PlanEntry(name, out_features, in_features, QuantScheme(bits, size, rounding))

        def load(name: str) -> QuantizedTensor:
            scheme = entries[name].scheme
            assert scheme is not None
            return check_tensor(name, _recover(name, baked(name), scale_of(name), scheme), entries[name])

        dense = [name for name in weights if name.removesuffix(".weight") not in entries]
        return ModelContent(
            layout=self.name,
            folder=folder,
            config=config,
            linears=entries,
            quantized=Lazy(entries, load),
            # The weight was compared when its codes were recovered.
            baked={},
            dense=weights.only(dense),
            bf16_names=linears_among(weights, dense),
        )

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        try:
            one_grid(f"the {self.name} layout", linears)
        except FormatError as error:
            return str(error)
        head = next((n for n in linears if n.endswith("embed_tokens") or n.rpartition(".")[2] == "lm_head"), None)
        if head is not None:
            what = f"{head} has a grid; the {self.name} layout holds the decoder's linears"
            return f"{what}: leave quant.head in bf16, or use gguf"
        return None

    def stored_scale(self, scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
        if bool((scale < 0).any()):
            raise FormatError(
                f"the {self.name} layout stores logarithms of scales, and this model has negative ones (mse_signed, or "
                "a Q4_0 of llama.cpp); "
                "every other format takes them"
            )
        if scheme.scale_rounding != "fp32":
            return scale.float()
        return scale_of_log(log_of_scale(scale), torch.float32).reshape(scale.shape)

    def linear_bytes(self, entry: PlanEntry) -> int:
        return 2 * entry.bf16_bytes + 4 * entry.num_scales + 1024

    def write(self, content: ModelContent, stage: Path) -> None:
        refuse(self, content)
        schemes = [entry.scheme for entry in content.linears.values() if entry.scheme]
        write_weights(stage, joined(content.dense, baked_weights(content)))
        written = open_weights(stage)

        def sidecar_spec(key: str) -> TensorSpec:
            name, _, part = key.rpartition(".")
            if part == "log_scale":
                return TensorSpec(torch.float32, (content.linears[name].num_scales,))
            return written.spec(key)

        def load(key: str) -> torch.Tensor:
            name, _, part = key.rpartition(".")
            return log_of_scale(content.quantized[name].scale) if part == "log_scale" else written[key]

        keys = [
            f"{name}.{part}"
            for name in content.linears
            for part in ("weight", "log_scale", "bias")
            if part != "bias" or f"{name}.bias" in content.dense
        ]
        write_sidecar(stage / SIDECAR, Lazy(keys, load, sidecar_spec))
        others = [n for n in content.bf16_names if "visual" not in n and "lm_head" not in n]
        settings: dict[str, Any] = {
            "bits": schemes[0].num_bits,
            "group_size": schemes[0].group_size,
            "skip_keywords": ["visual", "lm_head", *others],
            "num_replaced": len(content.linears),
        }
        if all(scheme.scale_rounding != "fp32" for scheme in schemes):
            settings["scale_dtype"] = "bfloat16"
        write_config(stage, {**content.config, "qat": settings})
        copy_companions(content, stage)


def _bits_of_codes(folder: Path, all_codes: Any) -> int:
    """Bits from the range that the codes of a whole model take."""
    low = high = 0
    for codes in all_codes:
        if not bool(torch.isfinite(codes).all()):
            raise FormatError(f"{folder} has a quantized weight with NaN or Inf in it; copy or train it again")
        low, high = min(low, int(codes.min())), max(high, int(codes.max()))
    if low >= -8 and high <= 7 and max(high, -low) >= 7:
        return 4
    if max(high, -low) > 7 and low >= -128 and high <= 127:
        return 8
    raise FormatError(
        f"{folder}: the codes of the whole model lie in [{low}, {high}]; 4 bits reach 7 or -8 and 8 bits stay in "
        '[-128, 127], so the bits are uncertain: state "qat": {"bits": ...} in its config.json'
    )
