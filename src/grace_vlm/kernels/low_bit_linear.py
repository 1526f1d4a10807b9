"""y = x W^T for a weight of 4 or 8 bits: one operator, whatever the number of tokens, and what it runs on.

    pack_linear(QuantizedTensor, device)          once, when a model is loaded (fragments.py)
    low_bit_linear(x, packed)                     BF16 or FP16 activations, FP32 sums

What runs is chosen by tokens and device (``path_of``):

    up to 64 tokens, on a GPU    low_bit_linear.cu, by NVRTC; Triton where there is no NVRTC
    more, on a GPU               torch on the BF16 copy if it was kept, else on bf16(q s), made anew in pieces of 64 MB;
                                 on a Hopper GPU with GRACE_KERNELS=tiles low_bit_tiles.cu (no GPU has run it yet)
    otherwise                    torch in FP32 on q s: the reference of the others

``GRACE_KERNELS=torch`` or ``triton`` forbids what comes before it. With ``norm`` and ``silu`` the layer's neighbours
run inside; they round as separate layers do, so that a fused model is the unfused one up to the order of sums.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import runs_triton
from grace_vlm.kernels.fragments import SLAB, TILE, PackedLinear, pack_linear, row_scales, unpack_codes
from grace_vlm.kernels.nvrtc import has_nvrtc
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.scheme import QuantizedTensor

__all__ = ["PackedLinear", "interleaved", "joined", "low_bit_linear", "pack_linear", "path_of"]

Path = Literal["tiles", "cuda", "triton", "torch", "dense"]
FEW_TOKENS = 64
"""Up to here weights are what a layer waits for."""
SCRATCH_BYTES = 64 << 20
"""Of bf16(q s) at a time."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm before the layer: ``weight`` (in,), ``epsilon``."""

    weight: torch.Tensor
    epsilon: float


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


def path_of(num_tokens: int, device: torch.device, dtype: torch.dtype) -> Path:
    """What runs a layer of so many tokens. ``GRACE_KERNELS`` can forbid it."""
    allowed = os.environ.get("GRACE_KERNELS", "cuda")
    if allowed not in ("tiles", "cuda", "triton", "torch"):
        raise ConfigError(f"GRACE_KERNELS is {allowed!r}; expected tiles, cuda, triton or torch, or leave it out")
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or allowed == "torch":
        return "torch"
    if num_tokens > FEW_TOKENS:
        is_hopper = torch.cuda.get_device_capability(device) == (9, 0) if allowed == "tiles" else False
        return "tiles" if is_hopper and has_nvrtc() else "dense"
    if allowed in ("tiles", "cuda") and has_nvrtc() and torch.cuda.get_device_capability(device) >= (8, 0):
        return "cuda"
    return "triton" if runs_triton(torch.empty(0, device=device)) else "torch"


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
        (..., out') in the dtype of x.

    Raises:
        ConfigError: shapes or dtypes that do not belong together.
    """
    if x.shape[-1] != packed.in_features or x.device != packed.device:
        raise ConfigError(
            f"low_bit_linear was given {tuple(x.shape)} on {x.device} for a layer of {packed.in_features} inputs on "
            f"{packed.device}; expected (..., {packed.in_features}) there"
        )
    width = packed.out_features // 2 if silu else packed.out_features
    flat = x.reshape(-1, packed.in_features)
    rest = None if residual is None else residual.reshape(-1, width)
    path = path_of(flat.shape[0], x.device, x.dtype)
    if not flat.shape[0]:
        out = flat.new_empty(0, width)
    elif path == "cuda":
        out = _cuda(flat.contiguous(), packed, bias, rest, norm, silu)
    else:
        out = _parts(path, flat, packed, bias, rest, norm, silu)
    return out.view(*x.shape[:-1], width)


def _parts(
    path: Path,
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Norm | None,
    silu: bool,
) -> torch.Tensor:
    """Norm, layer, activation and residual one after the other."""
    if norm is not None:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)
        x = norm.weight.to(x.dtype) * scaled.to(x.dtype)
    if path == "tiles" and packed.scale.dtype == torch.bfloat16 and packed.dense is None:
        return _tiles(x.contiguous(), packed, bias, residual, silu)
    if path == "torch":
        y = F.linear(x.float(), _values(packed), None if bias is None else bias.float()).to(x.dtype)
    elif path == "triton":
        from grace_vlm.kernels.low_bit_triton import linear

        y = linear(x.contiguous(), packed, bias)
    else:
        y = _dense(x, packed, None if bias is None else bias.to(x.dtype))
    if silu:
        pairs = y.view(y.shape[0], -1, 2, 8)
        y = (F.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(y.shape[0], -1)
    return y if residual is None else y + residual


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
        out.copy_(_values(packed)[first_row : first_row + len(out)])


@dataclass(frozen=True)
class Setup:
    """How ``low_bit_linear.cu`` is compiled for a number of tokens: tokens of a block in eights, row tiles of a warp,
    warps, slabs on their way."""

    eights: int
    rows: int
    warps: int
    depth: int


def setup_of(num_tokens: int, num_slabs: int) -> Setup:
    """By rule, for GPUs that nobody measured: registers for the tokens first, then as many weights on their way."""
    eights = next(n for n in (1, 2, 4, 8) if num_tokens <= 8 * n or n == 8)
    setup = {1: Setup(1, 1, 8, 4), 2: Setup(2, 1, 8, 4), 4: Setup(4, 2, 4, 4), 8: Setup(8, 2, 4, 2)}[eights]
    warps = max(1, min(setup.warps, num_slabs))
    return Setup(eights, setup.rows, warps, min(setup.depth, -(-num_slabs // warps)))


def defines_of(packed: PackedLinear, setup: Setup, is_half: bool, norm: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_linear.cu``."""
    return {
        **_layout_defines(packed, is_half),
        "NT": setup.eights,
        "ROWS": setup.rows,
        "WARPS": setup.warps,
        "DEPTH": setup.depth,
        "EARLY": setup.eights <= 2,
        "NORM": norm,
        "SILU": silu,
    }


@dataclass(frozen=True)
class TileSetup:
    """How ``low_bit_tiles.cu`` is compiled: tokens of a block, and warpgroups, of 64 rows each."""

    tokens: int
    warpgroups: int


def tile_setup_of(num_tokens: int, out_features: int, num_processors: int) -> TileSetup:
    """By rule: the largest blocks of which there are enough for every multiprocessor."""
    for setup in (TileSetup(128, 2), TileSetup(128, 1), TileSetup(64, 1)):
        blocks = -(-out_features // (64 * setup.warpgroups)) * -(-num_tokens // setup.tokens)
        if blocks >= num_processors:
            return setup
    return TileSetup(64, 1)


def tile_defines_of(packed: PackedLinear, setup: TileSetup, is_half: bool, silu: bool) -> dict[str, int]:
    """Macros of ``low_bit_tiles.cu``."""
    return {
        **_layout_defines(packed, is_half),
        "TOKENS": setup.tokens,
        "WGS": setup.warpgroups,
        "SILU": silu,
    }


def _layout_defines(packed: PackedLinear, is_half: bool) -> dict[str, int]:
    """What both texts must know of a weight."""
    return {
        "BITS": packed.num_bits,
        "HALF": is_half,
        "GROUP": 0 if packed.group_size == packed.in_features else packed.group_size,
        "WIDE": packed.scale.dtype == torch.float32,
        "TAIL": packed.in_features % SLAB != 0,
    }


@functools.cache
def _setup(num_tokens: int, in_features: int) -> Setup:
    return setup_of(num_tokens, -(-in_features // SLAB))


def _cuda(
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Norm | None,
    silu: bool,
) -> torch.Tensor:
    from grace_vlm.kernels.nvrtc import load_kernel

    tokens, tiles = x.shape[0], packed.out_features // TILE
    setup = _setup(tokens, packed.in_features)
    defines = defines_of(packed, setup, x.dtype == torch.float16, norm is not None, silu)
    kernel = load_kernel(
        "low_bit_linear.cu", "low_bit_linear", tuple((k, int(v)) for k, v in defines.items()), x.get_device()
    )
    out = torch.empty(tokens, packed.out_features // (2 if silu else 1), dtype=x.dtype, device=x.device)
    weight = None if norm is None else norm.weight.to(x.dtype).contiguous()
    added = None if bias is None else bias.to(x.dtype).contiguous()
    rest = None if residual is None else residual.to(x.dtype).contiguous()
    kernel(
        (-(-tiles // setup.rows), -(-tokens // (8 * setup.eights))),
        32 * setup.warps,
        [packed.words, packed.scale, x, weight, added, rest, out, tokens, tiles, packed.in_features,
         0.0 if norm is None else norm.epsilon],
    )  # fmt: skip
    return out


def _tiles(
    x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None, residual: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    from grace_vlm.kernels.nvrtc import load_kernel

    tokens, tiles, device = x.shape[0], packed.out_features // TILE, x.get_device()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    setup = tile_setup_of(tokens, packed.out_features, processors)
    defines = tile_defines_of(packed, setup, x.dtype == torch.float16, silu)
    kernel = load_kernel("low_bit_tiles.cu", "low_bit_tiles", tuple((k, int(v)) for k, v in defines.items()), device)
    out = torch.empty(tokens, packed.out_features // (2 if silu else 1), dtype=x.dtype, device=x.device)
    added = None if bias is None else bias.to(x.dtype).contiguous()
    rest = None if residual is None else residual.to(x.dtype).contiguous()
    kernel(
        (-(-tiles // (4 * setup.warpgroups)), -(-tokens // setup.tokens)),
        128 * setup.warpgroups,
        [packed.words, packed.scale, x, added, rest, out, tokens, tiles, packed.in_features],
    )
    return out
