"""Triton kernels that start while the one before them still runs (``starts_early``): what they call first, and how they
are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from grace_vlm.kernels import starts_early


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """Before anything that a kernel writes is computed with, and before anything is written."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def to_second_cache(pointer, num_bytes):
    """Ask for ``num_bytes`` (a multiple of 16) behind each pointer, without waiting; from Hopper on."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // $0", "=r,l,r",
        [pointer.to(tl.int64), tl.full(pointer.shape, num_bytes, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def early(x: torch.Tensor) -> dict[str, Any]:
    """Arguments of a launch beside x."""
    return {"EARLY": True, "launch_pdl": True} if x.is_cuda and starts_early(x.device) else {"EARLY": False}
