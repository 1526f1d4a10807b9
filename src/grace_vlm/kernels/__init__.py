"""Fast paths for a GPU. Each has the signature of the plain torch function that it replaces, which stands in the room
above it and which its tests compare it with; delete a file here and nothing is lost but time.

Triton is imported when a kernel is first asked for, never before.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``XDG_CACHE_HOME`` or ``~/.cache``; without a home the temporary folder."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user whom the system does not know
        home = Path(tempfile.gettempdir())
    return home / "grace_vlm"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to make a file of the cache, which is then at ``path`` at once: a reader never sees half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield made
        os.replace(made, path)


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether Triton can take these: contiguous in their last dimension, on a GPU, and Triton is installed (Linux)."""
    return all(x.is_cuda and (x.ndim == 0 or x.stride(-1) == 1) for x in tensors) and find_spec("triton") is not None


@functools.cache
def starts_early(device: int | torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs ("programmatic dependent launch", from Hopper
    on). One that is must wait for the other's end before it computes with what others have written, and before it
    writes; everything of ours does, so that whoever has waited for the last kernel has waited for all. Only weights,
    a norm's too, are taken before: whoever makes them waits for the GPU."""
    import torch

    is_nvidia = torch.cuda.is_available() and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Without gaps, and where kernels can load 16 bytes at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
