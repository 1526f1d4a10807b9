"""The CPU's kernels: C files, compiled where they run, called through ctypes.

    cpu.h, cpu_team.c     vectors and threads
    low_bit_cpu.c         y = x W^T of 4 or 8 bits (low_bit_cpu.py)
    decoder_cpu.c         gates, rotation, attention over pages (decoder_rows.py, paged_attention.py)

x86-64 with AVX2 and a C compiler; without them callers have their references in torch. The compiled library is kept by
the hash of its texts, flags and processor (``XDG_CACHE_HOME/grace_vlm/cpu``, else ``~/.cache``): it is made for the
processor that it was compiled on, and two processes that compile at once write the same file.
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
from pathlib import Path

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import cache_folder, replacing

HEADER, *TEXTS = (Path(__file__).with_name(name) for name in ("cpu.h", "cpu_team.c", "low_bit_cpu.c", "decoder_cpu.c"))

_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}
_SIGNATURES = {
    "low_bit_linear": "pppppppllllfiil",
    "gated_rows": "pplll",
    "rotate_append_rows": "pppppppppllllfl",
    "attend_pages": "pppppplllllll",
    "decode_layers": "plppppppllllllil",
}
"""Of the functions: pointers, longs, floats, ints."""


def flags() -> tuple[str, ...]:
    """For this processor, or for any with AVX2 where torch too was told so (``ATEN_CPU_CAPABILITY=avx2``).

    -O2, with the short loops unrolled that hold sums in registers: -O3 is no faster and compiles for seven seconds.
    """
    march = "x86-64-v3" if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" else "native"
    return ("-O2", "-fpeel-loops", f"-march={march}", "-std=gnu11", "-pthread", "-shared", "-fPIC")


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
    """The compiled files.

    Raises:
        ConfigError: this machine lacks something, or its compiler fails.
    """
    if reason := why_not():
        raise ConfigError(f"no INT4 kernel on this CPU: {reason}")
    folder = cache_folder() / "cpu"
    said = [*(path.read_text(encoding="utf-8") for path in (HEADER, *TEXTS)), *flags(), str(_compiler()), _processor()]
    path = folder / f"{hashlib.sha256(chr(10).join(said).encode()).hexdigest()[:32]}.so"
    loaded = ctypes.CDLL(str(path if path.is_file() else _compile(path)))
    for name, kinds in _SIGNATURES.items():
        getattr(loaded, name).argtypes = [_KINDS[kind] for kind in kinds]
    return loaded


@functools.cache
def missing() -> str | None:
    """As ``why_not``, after the files were compiled and loaded."""
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
        command = [str(_compiler()), *flags(), *map(str, TEXTS), "-lm", "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ConfigError(f"no INT4 kernel on this CPU: {' '.join(result.stderr.split())[:300]}")
    return path


_here = threading.local()
"""Of a thread: ``depth``, how many ``alone`` it is in, and ``team``, how many threads torch had for it before."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Torch's own operators run on one thread in here, these kernels on as many as torch had: torch's threads wait
    awake for the next small operator, on the cores that the kernels' are about to need.

    The number is torch's for the calling thread. A thread that first uses torch meanwhile keeps to one.
    """
    depth = getattr(_here, "depth", 0)
    if not depth:
        _here.team = torch.get_num_threads()
    _here.depth = depth + 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _here.depth -= 1
        torch.set_num_threads(1 if _here.depth else _here.team)


def num_threads() -> int:
    """Of a kernel: torch's, or what torch had before ``alone``."""
    return _here.team if getattr(_here, "depth", 0) else torch.get_num_threads()


def runs_c(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can take these: FP32 on a CPU that has them."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and missing() is None


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """As C reads numbers: FP32 without gaps. Name it: a copy must live while its address is used."""
    return None if tensor is None else tensor.float().contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    """Of its memory, which must be contiguous; null for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
