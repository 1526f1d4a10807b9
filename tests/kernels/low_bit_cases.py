"""Weights and inputs for the low-bit linear layers, and what is right for them."""

from __future__ import annotations

import torch

from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme


def weight(bits: int, out: int, inputs: int, group: int, seed: int = 0, wide: bool = False) -> QuantizedTensor:
    """Every code occurs; scales of both signs, over a factor of 20, in BF16 or in FP32 that BF16 cannot hold."""
    scheme = QuantScheme(bits, group, "fp32" if wide else "bf16")
    drawn = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (out, inputs), dtype=torch.int8, generator=drawn)
    scale = torch.rand(out, inputs // group, generator=drawn) * 0.02 + 0.001
    scale *= torch.randint(0, 2, scale.shape, generator=drawn) * 2 - 1
    return QuantizedTensor(codes, scale if wide else scale.bfloat16(), scheme)


def inputs_of(tokens: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """(tokens, out) x W^T in FP64, of q s itself."""
    return x.double() @ dequantize(tensor.codes, tensor.scale.double(), torch.float64).T


def error(y: torch.Tensor, right: torch.Tensor) -> float:
    return float((y.double().cpu() - right.cpu()).norm() / right.cpu().norm())


def bound(x: torch.Tensor, tensor: QuantizedTensor) -> float:
    """Twice the error of a BF16 layer: weights rounded to BF16, and its result to the dtype of x."""
    rounded = dequantize(tensor.codes, tensor.scale, torch.bfloat16).double()
    return 2 * error((x.double() @ rounded.T).to(x.dtype), exact(x, tensor))


def poison() -> None:
    """What a GPU's allocator gives next is full of NaN, whichever pool it is from."""
    for size in (1 << 14, 1 << 18, 1 << 22):
        blocks = [torch.full((size,), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        del blocks
