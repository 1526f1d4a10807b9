"""quantize, dequantize, fake_quantize: the reference that every kernel and every format is tested against.

With s the scale of a weight's group, z = none (symmetric), and b bits (GRACE, section 3 "Quantizer"):

    q  = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)        quantize      (round half to even)
    w^ = bf16(q * s)                                        dequantize
    fake_quantize(w) = dequantize(quantize(w))

**The scale that training uses is the scale that is stored.** ``round_scale`` is applied before the first division, so
(q, s) can be written to any format and read back unchanged. Nothing ever divides a baked weight: W8 codes would not
survive it. w^ is made from integers, so a zero has the sign of its scale, not of the weight that it came from.

Deviation from the official code: it trains an FP32 scale and rounds it at export, which changes 14 % of the BF16
weights. ``scale_rounding="fp32"`` reproduces it.
"""

from __future__ import annotations

import torch

from grace_vlm.errors import FormatError
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme, ScaleRounding

SCALE_MIN = 2.0**-14
"""Least magnitude of a stored scale: the smallest normal FP16 number, so that FP16 formats hold every scale exactly."""
SCALE_MAX = 2.0**15
"""Largest one: exact in FP16."""
_BLOCK_ELEMENTS = 1 << 20


def round_scale(scale: torch.Tensor, rounding: ScaleRounding) -> torch.Tensor:
    """The stored value of ``scale``, in its dtype: magnitude clamped to [2^-14, 2^15], then rounded; the sign is kept.

    ``bf16``: 8 significand bits. ``sig5``: 5 significand bits. ``fp32``: clamped only.
    """
    scale = scale.abs().clamp(SCALE_MIN, SCALE_MAX).copysign(scale)
    if rounding == "fp32":
        return scale
    if rounding == "sig5":
        mantissa, exponent = torch.frexp(scale)
        return torch.ldexp(torch.round(mantissa * 32) / 32, exponent).to(scale.dtype)
    return scale.to(torch.bfloat16).to(scale.dtype)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """FP64 stays FP64; everything else is computed in FP32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def to_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View (out, in) as (out, in / group_size, group_size)."""
    out_features, in_features = weight.shape
    return weight.reshape(out_features, in_features // group_size, group_size)


def _codes(weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Codes as floating-point integers, (out, groups, group_size)."""
    scheme.check(weight.shape[0], weight.shape[1], "this weight")
    dtype = compute_dtype(weight)
    ratio = to_groups(weight.to(dtype), scheme.group_size) / scale.to(dtype).unsqueeze(-1)
    # Adding zero turns the -0.0 of round(-0.3) into +0.0.
    return ratio.round().clamp(scheme.qmin, scheme.qmax) + 0.0


def quantize(weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Codes of a weight.

    Args:
        weight: (out, in) floating point; finite.
        scale: (out, in / group_size), already passed through ``round_scale``.
        scheme: the grid; a group size that does not divide ``in`` is a ``ConfigError``.

    Returns:
        (out, in) int8 in [qmin, qmax].
    """
    return _codes(weight, scale, scheme).reshape(weight.shape).to(torch.int8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """q * s, multiplied in FP32 (FP64 if the scale is) and rounded once to ``dtype``.

    Args:
        codes: (out, in) integers.
        scale: (out, groups); the group size is in / groups.
    """
    compute = compute_dtype(scale)
    groups = to_groups(codes.to(compute), codes.shape[1] // scale.shape[1])
    return (groups * scale.to(compute).unsqueeze(-1)).reshape(codes.shape).to(dtype)


def fake_quantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    scheme: QuantScheme,
    value_dtype: torch.dtype | None = torch.bfloat16,
) -> torch.Tensor:
    """The weight's grid value, returned in the weight's dtype. Idempotent bit for bit.

    Args:
        weight: (out, in); ``scale``: (out, in / group_size).
        value_dtype: what q * s is rounded to (the baked value, BF16); None leaves the product alone.
    """
    compute = compute_dtype(weight)
    value = (_codes(weight, scale, scheme) * scale.to(compute).unsqueeze(-1)).reshape(weight.shape)
    if value_dtype is not None:
        value = value.to(value_dtype)
    return value.to(weight.dtype)


def quantize_tensor(weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """(codes, stored scale, scheme) of one weight; ``FormatError`` if weight or scale is not finite."""
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(scale).all()):
        raise FormatError("cannot quantize a weight with NaN or Inf in it; look at the step that made it")
    stored = round_scale(scale, scheme.scale_rounding)
    scale_dtype = torch.float32 if scheme.scale_rounding == "fp32" else torch.bfloat16
    return QuantizedTensor(quantize(weight, stored, scheme), stored.to(scale_dtype), scheme)


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """Rows of an (out, in) matrix in parts of about a million elements on a CPU; all at once elsewhere.

    Temporaries of that size stay in the cache and in the process: larger ones are new pages from the system each time,
    which costs more than the arithmetic.
    """
    num_rows, row_elements = weight.shape
    step = max(1, _BLOCK_ELEMENTS // max(row_elements, 1)) if weight.device.type == "cpu" else max(num_rows, 1)
    return [slice(first, first + step) for first in range(0, num_rows, step)]


def bake(tensor: QuantizedTensor) -> torch.Tensor:
    """The BF16 weight (out, in) of a quantized tensor: bf16(q * s)."""
    baked = torch.empty(tensor.codes.shape, dtype=torch.bfloat16, device=tensor.codes.device)
    for rows in row_blocks(tensor.codes):
        baked[rows] = dequantize(tensor.codes[rows], tensor.scale[rows], torch.bfloat16)
    return baked
