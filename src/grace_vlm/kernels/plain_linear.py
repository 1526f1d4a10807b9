"""y = x W^T for a few tokens and a weight as torch has it, with the gate and the residual after.

cuBLAS is made for many tokens. For a few a layer takes as long as its weights take to arrive, and each launch around it
adds to that: ``low_bit_linear.cu`` reads plain weights as it reads packed ones, one launch for all of it.
"""

from __future__ import annotations

import torch

from grace_vlm.kernels import aligned, starts_early
from grace_vlm.kernels.fragments import BLOCK, TILE
from grace_vlm.kernels.low_bit_cuda import plain_setup_of, run_plain
from grace_vlm.kernels.low_bit_linear import allowed_kernels, require_beside
from grace_vlm.kernels.nvrtc import has_nvrtc

FEW_TOKENS = 16


def takes_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``plain_linear`` is the way: (n, in) of up to ``FEW_TOKENS`` tokens on a GPU whose kernels start early,
    where it was measured; sides in whole tiles. ``GRACE_KERNELS=triton`` and ``torch`` forbid it."""
    return (
        x.is_cuda
        and 0 < len(x) <= FEW_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16)
        and (weight.dtype, weight.device) == (x.dtype, x.device)
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and weight.shape[0] % (2 * TILE) == 0
        and weight.shape[1] == x.shape[1]
        and weight.shape[1] % BLOCK == 0
        and allowed_kernels() in ("tiles", "cuda")
        and starts_early(x.device)
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
        x: (n, in) BF16 or FP16. weight: (out, in) in its dtype, gates first with ``silu``; it must have been complete
            before, as it is read before the kernel waits for others (``starts_early``).
        bias: (out,), added before rounding. residual: (n, out'), added to the rounded result and rounded again.
        silu: silu(gate) times value comes out, and out' = out / 2.

    Returns:
        (n, out') in the dtype of x, without a graph: nothing here is trained.

    Raises:
        ConfigError: a bias or residual of another shape or device.
    """
    width = len(weight) // 2 if silu else len(weight)
    require_beside("bias", bias, (len(weight),), x)
    require_beside("residual", residual, (len(x), width), x)
    setup = plain_setup_of(len(x), *weight.shape)
    # Kernels go to the current GPU, whichever their tensors are on.
    with torch.no_grad(), torch.cuda.device(x.device):
        return run_plain(setup, aligned(x), weight, bias, residual, silu)
