"""What a cache keeps of numbers: E4M3 in torch and in Triton (interpreted on a CPU), at every edge of the format."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from grace_vlm.kernels.cache_rows import FP8, as_kept, put_rows, read_rows
from grace_vlm.kernels.cache_rows_triton import as_kept as as_kept_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_fp8 = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no E4M3 on this GPU"
)
ALL = torch.arange(127, dtype=torch.uint8).view(FP8).float()
"""Every number of E4M3 that is not negative, in order; its last is 448."""


@triton.jit
def _keep(x, kept, again, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(kept + at, as_kept_triton(tl.load(x + at), kept.dtype.element_ty))
    tl.store(again + at, tl.load(kept + at, mask=at >= 0, other=0.0).to(tl.float32))


def edges() -> torch.Tensor:
    """(1024,) numbers: all of E4M3, the middles between neighbours and beside them, what is too large or small."""
    middle = (ALL[1:] + ALL[:-1]) / 2
    wide = torch.tensor([448.0, 449.0, 464.0, 465.0, 480.0, 1e30, torch.inf, 2.0**-10, 3 * 2.0**-10, 2.0**-30])
    found = torch.cat([ALL, middle, middle * (1 + 2.0**-20), middle * (1 - 2.0**-20), wide])
    found = torch.cat([found, -found])
    return torch.cat([found, torch.randn(1024 - len(found) % 1024, generator=torch.Generator().manual_seed(0))])


def test_the_nearest_number_half_to_even_and_never_more_than_448() -> None:
    x = edges()
    away = (x.double().abs()[:, None].clamp(max=448) - ALL.double()).abs()
    nearest = away.min(dim=1, keepdim=True).values == away
    even = nearest & (torch.arange(127) % 2 == 0)
    right = ALL[torch.where(nearest.sum(1) == 2, even.int().argmax(1), nearest.int().argmax(1))]
    found = as_kept(x, FP8).float()
    assert torch.equal(found.abs(), right)
    assert not bool((found * x < 0).any())
    assert as_kept(torch.tensor([torch.nan]), FP8).isnan().all()
    assert torch.equal(as_kept(x, torch.bfloat16), x.bfloat16())


@needs_fp8
def test_triton_keeps_what_torch_keeps() -> None:
    x = edges().to(DEVICE)
    kept, again = torch.empty(len(x), dtype=FP8, device=DEVICE), torch.empty_like(x)
    _keep[(len(x) // 1024,)](x, kept, again, SIZE=1024)
    assert torch.equal(again, as_kept(x, FP8).float())
    assert torch.equal(kept.float(), again)
    plain, again = torch.empty_like(x), torch.empty_like(x)
    _keep[(len(x) // 1024,)](x, plain, again, SIZE=1024)
    assert torch.equal(again, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_rows_to_slots_and_back(dtype: torch.dtype) -> None:
    cache = torch.zeros(12, 2, 8, device=DEVICE).to(dtype)
    x = 300 * torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    slots = torch.tensor([7, 0, 11], device=DEVICE)
    put_rows(cache, slots, x)
    assert torch.equal(read_rows(cache, slots, torch.float32), as_kept(x, dtype).float())
    others = read_rows(cache, torch.tensor([1, 2, 3, 4, 5, 6, 8, 9, 10], device=DEVICE), torch.bfloat16)
    assert others.dtype == torch.bfloat16
    assert not others.any()
