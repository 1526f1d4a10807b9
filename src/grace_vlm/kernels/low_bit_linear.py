"""y = x W^T for a weight of 4 or 8 bits: one operator, whatever the number of tokens, and what it runs on.

    pack_linear(QuantizedTensor, device)          once, when a model is loaded (fragments.py)
    low_bit_linear(x, packed)                     BF16 or FP16 activations, FP32 sums

What runs is chosen by tokens and device (``path_of``):

    more than 64, with a copy    torch on the BF16 weight, if it was kept
    many, on a Hopper GPU        low_bit_tiles.cu, by NVRTC: more than 16
    few, on a GPU                low_bit_linear.cu, by NVRTC; Triton where there is no NVRTC: up to 64
    many, on another GPU         torch on bf16(q s), made anew in pieces of 64 MB
    otherwise                    torch in FP32 on q s: the reference of the others

What few and many are, and how a kernel is compiled, was measured for some GPUs (tuned.json) and is a rule elsewhere.
A norm before the layer is a launch of its own: inside, every block would do all of it (docs/log.md).
``GRACE_KERNELS=cuda``, ``triton`` or ``torch`` forbids ``tiles`` and what comes before it in that order. Bias, ``silu``
and residual run inside the layer; they round as separate layers do, so that a fused model is the unfused one up to the
order of sums.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import aligned, runs_triton
from grace_vlm.kernels.decoder_rows import Norm, rms_norm
from grace_vlm.kernels.fragments import TILE, PackedLinear, pack_linear, row_scales, unpack_codes
from grace_vlm.kernels.low_bit_cuda import FEW_TOKENS, Setup, TileSetup, run_few, run_many, setup_for
from grace_vlm.kernels.nvrtc import has_nvrtc
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.scheme import QuantizedTensor

__all__ = ["Norm", "PackedLinear", "interleaved", "joined", "low_bit_linear", "pack_linear", "path_of"]

Path = Literal["tiles", "cuda", "triton", "torch", "dense"]
SCRATCH_BYTES = 64 << 20
"""Of bf16(q s) at a time."""
REFERENCE_ELEMENTS = 1 << 24
"""Of q s in FP32 at a time: a vocabulary's head would be gigabytes at once."""


def joined(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """Layers of one input as one, rows end to end: query, key and value."""
    schemes = {tensor.scheme for tensor in tensors}
    assert len(schemes) == 1, "layers of different schemes cannot be one"
    codes, scales = torch.cat([t.codes for t in tensors]), torch.cat([t.scale for t in tensors])
    return QuantizedTensor(codes, scales, tensors[0].scheme)


def interleaved(gate: QuantizedTensor, value: QuantizedTensor) -> QuantizedTensor:
    """Gate and up projection as one for ``silu=True``: eight rows of one, eight of the other. Rows: a multiple of 8."""
    assert gate.scheme == value.scheme
    assert gate.shape == value.shape

    def mixed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([a.view(-1, 8, a.shape[1]), b.view(-1, 8, b.shape[1])], dim=1).view(-1, a.shape[1])

    return QuantizedTensor(mixed(gate.codes, value.codes), mixed(gate.scale, value.scale), gate.scheme)


def path_of(num_tokens: int, packed: PackedLinear, dtype: torch.dtype) -> Path:
    """What runs a layer of so many tokens. ``GRACE_KERNELS`` can forbid it."""
    allowed, device = allowed_kernels(), packed.device
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or allowed == "torch":
        return "torch"
    if num_tokens > FEW_TOKENS and packed.dense is not None and dtype == torch.bfloat16:
        return "dense"
    if allowed != "triton" and has_nvrtc() and torch.cuda.get_device_capability(device) >= (8, 0):
        setup = _setup(num_tokens, packed)
        if setup is not None:
            return "cuda" if isinstance(setup, Setup) else "tiles"
    if num_tokens > FEW_TOKENS:
        return "dense"
    return "triton" if runs_triton(packed.words) else "torch"


def allowed_kernels() -> str:
    """The best that ``GRACE_KERNELS`` lets run."""
    allowed = os.environ.get("GRACE_KERNELS", "tiles")
    if allowed not in ("tiles", "cuda", "triton", "torch"):
        raise ConfigError(f"GRACE_KERNELS is {allowed!r}; expected tiles, cuda, triton or torch, or leave it out")
    return allowed


def _setup(num_tokens: int, packed: PackedLinear) -> Setup | TileSetup | None:
    """What NVRTC's kernels are compiled for, as far as ``GRACE_KERNELS`` lets them."""
    return setup_for(num_tokens, packed, with_tiles=allowed_kernels() == "tiles")


def low_bit_linear(
    x: torch.Tensor,
    packed: PackedLinear,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: Norm | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """x W^T, and what stands around it in a decoder.

    Args:
        x: (..., in) BF16 or FP16 (FP32 only where torch runs it).
        bias: (out,), added before rounding. residual: (..., out'), added to the rounded result and rounded again.
        norm: of x, before. silu: the layer is ``interleaved``; silu(gate) times value comes out, and out' = out / 2.

    Returns:
        (..., out') in the dtype of x, without a graph: nothing here is trained.

    Raises:
        ConfigError: shapes or dtypes that do not belong together.
    """
    if x.shape[-1] != packed.in_features or x.device != packed.device:
        raise ConfigError(
            f"low_bit_linear was given {tuple(x.shape)} on {x.device} for a layer of {packed.in_features} inputs on "
            f"{packed.device}; expected (..., {packed.in_features}) there"
        )
    width = packed.out_features // 2 if silu else packed.out_features
    require_beside("bias", bias, (packed.out_features,), x)
    require_beside("residual", residual, (*x.shape[:-1], width), x)
    require_beside("norm.weight", None if norm is None else norm.weight, (packed.in_features,), x)
    flat = x.detach().reshape(-1, packed.in_features)
    rest = None if residual is None else residual.reshape(-1, width).to(x.dtype)
    path = path_of(flat.shape[0], packed, x.dtype)
    # Kernels go to the current GPU, whichever their tensors are on.
    with torch.no_grad(), torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if not flat.shape[0]:
            out = flat.new_empty(0, width)
        else:
            out = _run(path, flat, packed, bias, rest, norm, silu)
    return out.view(*x.shape[:-1], width)


def require_beside(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], x: torch.Tensor) -> None:
    """``ConfigError`` unless it is of that shape and beside x: a kernel would read on behind its end."""
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != x.device):
        raise ConfigError(
            f"a layer was given {name} {tuple(tensor.shape)} on {tensor.device}; expected {shape} on {x.device}"
        )


def _run(
    path: Path,
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Norm | None,
    silu: bool,
) -> torch.Tensor:
    """The norm, and the layer with what comes after it: in one launch, or one after the other."""
    if norm is not None:
        x = rms_norm(x, norm)
    if path in ("cuda", "tiles"):
        setup = _setup(len(x), packed)
        if isinstance(setup, Setup):
            return run_few(setup, aligned(x), packed, bias, residual, silu)
        assert setup is not None
        return run_many(setup, aligned(x), packed, bias, residual, silu)
    if path == "torch":
        y = _reference(x.float(), packed, None if bias is None else bias.float()).to(x.dtype)
    elif path == "triton":
        from grace_vlm.kernels.low_bit_triton import linear

        y = linear(aligned(x), packed, bias)
    else:
        y = _dense(x, packed, None if bias is None else bias.to(x.dtype))
    if silu:
        pairs = y.view(y.shape[0], -1, 2, 8)
        y = (F.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(y.shape[0], -1)
    return y if residual is None else y + residual


def _reference(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
    """(tokens, out) in FP32, some rows of the weight at a time."""
    rows = max(TILE, REFERENCE_ELEMENTS // packed.in_features // TILE * TILE)
    parts = []
    for first in range(0, packed.out_features, rows):
        own = None if bias is None else bias[first : first + rows]
        parts.append(F.linear(x, _values(_row_tiles(packed, first, rows)), own))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _row_tiles(packed: PackedLinear, first_row: int, num_rows: int) -> PackedLinear:
    """At most so many rows of a weight, both numbers a multiple of 16; the same memory."""
    tiles = slice(first_row // TILE, (first_row + num_rows) // TILE)
    words = packed.words[tiles]
    return replace(packed, words=words, scale=packed.scale[tiles], out_features=len(words) * TILE, dense=None)


def _values(packed: PackedLinear) -> torch.Tensor:
    """(out, in) q s in FP32, exactly."""
    return dequantize(unpack_codes(packed), row_scales(packed).float(), torch.float32)


def _dense(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
    """By cuBLAS on bf16(q s): the copy that was kept, or pieces of it in scratch memory."""
    if packed.dense is not None and x.dtype == torch.bfloat16:
        return F.linear(x, packed.dense, bias)
    rows = max(TILE, SCRATCH_BYTES // (2 * packed.in_features) // TILE * TILE)
    scratch = torch.empty(min(rows, packed.out_features), packed.in_features, dtype=torch.bfloat16, device=x.device)
    parts = []
    for first in range(0, packed.out_features, rows):
        piece = scratch[: min(rows, packed.out_features - first)]
        _dequantize_rows(packed, piece, first)
        parts.append(F.linear(x, piece.to(x.dtype), None if bias is None else bias[first : first + rows]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _dequantize_rows(packed: PackedLinear, out: torch.Tensor, first_row: int) -> None:
    if runs_triton(out):
        from grace_vlm.kernels.low_bit_triton import dequantize_rows

        dequantize_rows(packed, out, first_row)
    else:
        out.copy_(_values(_row_tiles(packed, first_row, len(out))))
