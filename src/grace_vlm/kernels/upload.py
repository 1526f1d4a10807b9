"""From the host to a device without a wait.

A copy from ordinary memory makes the host wait until the GPU has done everything before it (CUDA stages it through a
buffer of its own); one from pinned memory is queued like a kernel. Every tensor of a training step goes up this way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on ``device``, ready for what is queued there after this call; itself if it is there already."""
    if device.type == "cuda" and not host.is_cuda and host.numel() and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def upload_cat(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """``torch.cat`` of tensors, on ``device``. Those that lie end to end in memory, as the loader's workers hand pixels
    over, go up in one copy: a copy each of 64 small pictures took 5 ms of the host."""
    runs: list[list[torch.Tensor]] = []
    for part in parts:
        if runs and _lies_behind(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    wholes = [upload(_whole(run), device) for run in runs]
    return wholes[0] if len(wholes) == 1 else torch.cat(wholes)


def _lies_behind(part: torch.Tensor, following: torch.Tensor) -> bool:
    """Whether one begins where the other ends, so that both are pieces of one tensor along the first dimension."""
    return (
        following.data_ptr() == part.data_ptr() + part.numel() * part.element_size()
        and following.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        and following.dtype == part.dtype
        and following.shape[1:] == part.shape[1:]
        and part.is_contiguous()
        and following.is_contiguous()
    )


def _whole(run: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that the parts are pieces of, without a copy."""
    if len(run) == 1:
        return run[0]
    # A stride of a dimension of one element may be anything.
    flat = run[0].flatten().as_strided((sum(part.numel() for part in run),), (1,))
    return flat.view(-1, *run[0].shape[1:])
