"""From the host to a device without a wait.

A copy from ordinary memory makes the host wait until the GPU has done everything before it (CUDA stages it through a
buffer of its own); one from pinned memory is queued like a kernel. Every tensor of a training step goes up this way.
"""

from __future__ import annotations

import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on ``device``, ready for what is queued there after this call; itself if it is there already."""
    if device.type == "cuda" and not host.is_cuda and host.numel() and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
