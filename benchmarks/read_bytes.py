"""The time to only read tensors' bytes with several threads: read_bytes.c, compiled where it runs.

The floor of what is bound by memory. The loop is C, for vector loads and no allocation; its sum is returned, so that no
compiler can leave a byte out, and a test compares it.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

TEXT = Path(__file__).with_name("read_bytes.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-pthread", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """``ValueError`` without a C compiler or if it fails."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ValueError("there is no C compiler (cc or gcc)")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "read_bytes.so"
        result = subprocess.run([compiler, *FLAGS, str(TEXT), "-o", str(made)], capture_output=True, text=True)
        if result.returncode:
            raise ValueError(" ".join(result.stderr.split())[:300])
        loaded = ctypes.CDLL(str(made))  # the file may go once it is mapped
    loaded.read_stretches.restype = ctypes.c_uint64
    return loaded


@dataclass(frozen=True)
class Reader:
    """Call it to read all of its tensors once, in order; returns the sum of their words modulo 2^64.

    Args:
        tensors: contiguous, at addresses that are multiples of 64 (torch's own memory on a CPU is).
    """

    tensors: tuple[torch.Tensor, ...]
    num_threads: int

    def __post_init__(self) -> None:
        if any(tensor.data_ptr() % 64 or not tensor.is_contiguous() for tensor in self.tensors):
            raise ValueError("a tensor is not contiguous or does not start at a multiple of 64 bytes")

    def __call__(self) -> int:
        count = len(self.tensors)
        stretches = (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in self.tensors))
        sizes = (ctypes.c_long * count)(*(tensor.nbytes for tensor in self.tensors))
        return int(library().read_stretches(stretches, sizes, ctypes.c_long(count), ctypes.c_long(self.num_threads)))
