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
    whole = _end_to_end(parts)
    return torch.cat([upload(part, device) for part in parts]) if whole is None else upload(whole, device)


def _end_to_end(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The one tensor that the parts are pieces of along the first dimension, without a copy; None if they are not."""
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        is_next = part.data_ptr() == end and part.untyped_storage().data_ptr() == storage
        if not is_next or part.dtype != first.dtype or part.shape[1:] != first.shape[1:] or not part.is_contiguous():
            return None
        end += part.numel() * part.element_size()
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())
