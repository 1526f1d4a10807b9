"""The linear layer of 4 or 8 bits on a CPU: one C file, compiled where it runs, called through ctypes.

    pack_panels(QuantizedTensor)            once: panels of sixteen rows (low_bit_cpu.c draws them)
    panel_linear(x, packed)                 FP32 in and out; activations become bytes, a scale a token and group
    panel_linear(x, packed, exact=True)     FP32 arithmetic on q s
    panel_rows(packed, ids)                 single rows, where a head is an embedding too

The compiled library is kept by the hash of source, flags and processor (``XDG_CACHE_HOME/grace_vlm/cpu``, else
``~/.cache``): it is made for the processor it was compiled on, and two processes that compile at once write the same
file.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import cache_folder, replacing
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.packing import to_unsigned
from grace_vlm.quant.scheme import QuantizedTensor

ROWS, SLAB = 16, 32
"""Rows of a panel, and inputs that lie together in it."""
FLAGS = ("-O2", "-fpeel-loops", "-march=native", "-std=gnu11", "-pthread", "-shared", "-fPIC")
TEXT = Path(__file__).with_name("low_bit_cpu.c")


@dataclass(frozen=True)
class PanelLinear:
    """A weight for ``panel_linear``.

    Args:
        codes: uint8 (panels, slabs, chunks, 16, 4), a chunk for every bit; rows that fill up a panel mean 0.
        group_size: inputs of a scale. scale: FP32 (panels, groups, 16).
        out_features, in_features: of the layer, nothing filled up.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    num_bits: int
    group_size: int
    out_features: int
    in_features: int

    device: ClassVar = torch.device("cpu")

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def takes(tensor: QuantizedTensor) -> bool:
    """Whether ``pack_panels`` does."""
    return tensor.scheme.num_bits in (4, 8) and tensor.shape[1] // tensor.scale.shape[1] % 32 == 0


def pack_panels(tensor: QuantizedTensor) -> PanelLinear:
    """Codes and scales of a weight in panels.

    Raises:
        ConfigError: not 4 or 8 bits, or groups of no multiple of 32.
    """
    out_features, in_features = tensor.shape
    bits, group = tensor.scheme.num_bits, in_features // tensor.scale.shape[1]
    if not takes(tensor):
        raise ConfigError(
            f"a weight of {bits} bits in groups of {group} has no fast kernel on a CPU; expected 4 or 8 bits and "
            "groups of a multiple of 32"
        )
    rows = -(-out_features // ROWS) * ROWS
    codes = torch.zeros(rows, in_features, dtype=torch.int8)
    codes[:out_features] = tensor.codes
    fours = codes.view(rows // ROWS, ROWS, in_features // SLAB, SLAB // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        unsigned = to_unsigned(fours, 4)
        packed = unsigned[:, :, :4] | unsigned[:, :, 4:] << 4
    else:
        packed = fours.contiguous().view(torch.uint8)
    scale = torch.zeros(rows, tensor.scale.shape[1])
    scale[:out_features] = tensor.scale.float()
    panels = scale.view(rows // ROWS, ROWS, -1).transpose(1, 2).contiguous()
    return PanelLinear(packed.contiguous(), panels, bits, group, out_features, in_features)


def why_not() -> str | None:
    """What this machine lacks for it; None: nothing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the processor is {platform.machine()}, not x86-64"
    if not torch.cpu._is_avx2_supported():
        return "the processor has no AVX2"
    if _compiler() is None:
        return "there is no C compiler (cc or gcc)"
    return None


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled file.

    Raises:
        ConfigError: this machine lacks something, or its compiler fails.
    """
    if reason := why_not():
        raise ConfigError(f"no INT4 kernel on this CPU: {reason}")
    folder = cache_folder() / "cpu"
    said = [TEXT.read_text(encoding="utf-8"), *FLAGS, str(_compiler()), _processor()]
    path = folder / f"{hashlib.sha256(chr(10).join(said).encode()).hexdigest()[:32]}.so"
    return ctypes.CDLL(str(path if path.is_file() else _compile(path)))


@functools.cache
def missing() -> str | None:
    """As ``why_not``, after the file was compiled and loaded."""
    try:
        library()
    except (ConfigError, OSError) as error:
        return str(error)
    return None


def _processor() -> str:
    """What ``-march=native`` looks at."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    return platform.processor()


def _compile(path: Path) -> Path:
    """The library at ``path``, or where no file can be written there in a folder of this process."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        path = Path(tempfile.mkdtemp()) / path.name
    with replacing(path) as made:
        command = [str(_compiler()), *FLAGS, str(TEXT), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ConfigError(f"no INT4 kernel on this CPU: {' '.join(result.stderr.split())[:300]}")
    return path


_lock = threading.Lock()
_inside, _team = 0, 0
"""How many are in ``alone``, and how many threads torch had before."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Torch's own operators run on one thread in here, ``panel_linear`` on as many as torch had: torch's threads wait
    awake for the next small operator, on the cores that this file's are about to need.

    Torch has one number for a process: a thread that first uses torch meanwhile keeps to one. Several may be in here at
    once; the last one out gives the number back.
    """
    global _inside, _team
    with _lock:
        if not _inside:
            _team = torch.get_num_threads()
        _inside += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(1 if _inside else _team)


def panel_linear(
    x: torch.Tensor,
    packed: PanelLinear,
    *,
    bias: torch.Tensor | None = None,
    exact: bool = False,
    num_threads: int | None = None,
) -> torch.Tensor:
    """x W^T + bias.

    Args:
        x: (..., in) FP32. bias: (out,) FP32.
        exact: FP32 arithmetic on q s; else activations are rounded to 127 steps of the largest of their group.
        num_threads: torch's if None, see ``alone``.

    Returns:
        (..., out) FP32.

    Raises:
        ConfigError: another dtype or width; no kernel here (``why_not``).
    """
    if x.dtype != torch.float32 or x.shape[-1] != packed.in_features:
        raise ConfigError(
            f"panel_linear was given {tuple(x.shape)} in {x.dtype} for a layer of {packed.in_features} inputs; "
            f"expected (..., {packed.in_features}) in torch.float32"
        )
    flat = x.reshape(-1, packed.in_features).contiguous()
    out = torch.empty(len(flat), packed.out_features)
    added = None if bias is None else bias.float().contiguous()
    status = library().low_bit_linear(
        *(_address(tensor) for tensor in (packed.codes, packed.scale, flat, added, out)),
        *(ctypes.c_long(n) for n in (len(flat), packed.out_features, packed.in_features, packed.group_size)),
        packed.num_bits,
        int(exact),
        ctypes.c_long(num_threads or (_team if _inside else torch.get_num_threads())),
    )
    if status:
        raise MemoryError("no memory for the bytes of a layer's inputs")
    return out.view(*x.shape[:-1], packed.out_features)


def panel_rows(packed: PanelLinear, ids: torch.Tensor) -> torch.Tensor:
    """(n, in) q s of rows ``ids`` (n,) int64, in FP32."""
    assert packed.num_bits == 8, "rows of four bits are nobody's embedding"
    panel, row = ids // ROWS, ids % ROWS
    codes = packed.codes[panel, :, :, row].view(torch.int8).flatten(1)
    return dequantize(codes, packed.scale[panel, :, row], torch.float32)


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
