"""y = x W^T for a few tokens and a weight as torch has it, with the gate and the residual after.

cuBLAS is made for many tokens. For a few a layer takes as long as its weights take to arrive, and each launch around it
adds to that: ``low_bit_linear.cu`` reads plain weights as it reads packed ones, one launch for all of it.
"""

from __future__ import annotations

import torch

from grace_vlm.kernels import aligned
from grace_vlm.kernels.fragments import BLOCK, TILE
from grace_vlm.kernels.low_bit_cuda import plain_setup_of, run_plain
from grace_vlm.kernels.low_bit_linear import allowed_kernels
from grace_vlm.kernels.nvrtc import has_nvrtc

FEW_TOKENS = 16


def takes_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``plain_linear`` is the way: (n, in) of up to ``FEW_TOKENS`` tokens on a GPU, sides in whole tiles."""
    return (
        x.is_cuda
        and 0 < len(x) <= FEW_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and weight.shape[0] % (2 * TILE) == 0
        and weight.shape[1] % BLOCK == 0
        and allowed_kernels() in ("tiles", "cuda")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and has_nvrtc()
    )


def plain_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """x W^T of what ``takes_plain``, rounded where separate layers round.

    Args:
        x: (n, in) BF16 or FP16. weight: (out, in) in its dtype, gates first with ``silu``.
        bias: (out,), added before rounding. residual: (n, out'), added to the rounded result and rounded again.
        silu: silu(gate) times value comes out, and out' = out / 2.

    Returns:
        (n, out') in the dtype of x.
    """
    setup = plain_setup_of(len(x), *weight.shape)
    # Kernels go to the current GPU, whichever their tensors are on.
    with torch.no_grad(), torch.cuda.device(x.device):
        return run_plain(setup, aligned(x), weight, bias, residual, silu)
