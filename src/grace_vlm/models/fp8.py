"""A teacher's linears in FP8: one byte a weight, products on the FP8 tensor cores.

Weights are E4M3 with one FP32 scale a row (output), activations E4M3 with one scale a token, made on the fly; products
are summed in FP32 and come out in BF16 (``torch._scaled_mm``, row-wise). Without such a GPU the same rounded values are
multiplied in the working precision, so tests on a CPU see the same teacher. Decoder and vision tower are rounded;
biases, norms, the projector and the head stay as they are. The teacher differs from its BF16 self by this rounding: the
gate and the divergence are then against that teacher.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from grace_vlm.models.adapter import Adapter
from grace_vlm.quant.plan import Part

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
ROUNDED: tuple[Part, ...] = ("language", "tower")
"""Parts whose linears are."""


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) of any floating dtype -> (n, d) E4M3 and (n, 1) FP32 scales; a row's largest magnitude becomes 448."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3), scale


class Fp8Linear(nn.Module):
    """``nn.Linear`` for inference with its weight in E4M3."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = quantize_rows(linear.weight.detach())
        # As bytes: .float() of a model would turn an FP8 tensor into FP32.
        self.register_buffer("weight_bytes", codes.view(torch.uint8))
        self.register_buffer("weight_scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_rows(rows)
        bytes_, weight_scale = self.get_buffer("weight_bytes"), self.get_buffer("weight_scale")
        weight = bytes_.view(_E4M3)
        if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 9):
            out = torch._scaled_mm(
                codes, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=x.dtype, use_fast_accum=True
            )
        else:
            out = F.linear(codes.to(x.dtype), weight.to(x.dtype)) * (scale * weight_scale.t()).to(x.dtype)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def takes(linear: nn.Linear) -> bool:
    return linear.in_features % 16 == linear.out_features % 16 == 0


def to_fp8(model: Any, adapter: Adapter) -> None:
    """Replace the linears of decoder and vision tower, in place; but those whose sides the FP8 tensor cores do not take
    (Qwen2.5-VL's tower has 3,420 channels)."""
    rounded = "|".join(adapter.parts[part] for part in ROUNDED)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and re.fullmatch(rounded, name) and takes(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Fp8Linear(module))
