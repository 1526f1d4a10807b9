"""CUDA text to a running kernel: NVRTC, which comes with torch's CUDA wheels (users have no nvcc), and the driver.

A compiled kernel is half a second of NVRTC, so it is kept in a folder, by the hash of text, options and compiler
(``XDG_CACHE_HOME/grace_vlm/cubin``, else ``~/.cache``). Two processes that compile at once write the same file.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import cache_folder, replacing, starts_early

FOLDER, HEADER = Path(__file__).parent, "low_bit_common.cuh"


@functools.cache
def has_nvrtc() -> bool:
    """Whether CUDA text can be compiled and launched here: torch's own CUDA packages, and NVIDIA's Python bindings."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return False
    try:
        from cuda.bindings import nvrtc

        return int(nvrtc.nvrtcVersion()[0]) == 0
    except (ImportError, RuntimeError):  # no library, or one that the bindings do not know
        return False


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The values of a call of the bindings; ``ConfigError`` if it failed."""
    status, *values = result
    if int(status) != 0:
        raise ConfigError(f"{what} failed: {status}; update the GPU's driver or set GRACE_KERNELS=triton")
    return values[0] if len(values) == 1 else values


def compile_text(text: str, architecture: str, defines: Mapping[str, int]) -> bytes:
    """The cubin of CUDA text, which may include ``low_bit_common.cuh``.

    Args:
        architecture: ``sm_90`` and the like. defines: macros.

    Raises:
        ConfigError: it does not compile, with the compiler's first lines.
    """
    from cuda.bindings import nvrtc

    macros = [f"-D{name}={int(value)}" for name, value in sorted(defines.items())]
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *macros]
    version = _checked(nvrtc.nvrtcVersion(), "asking NVRTC for its version")
    header = (FOLDER / HEADER).read_text(encoding="utf-8")
    digest = hashlib.sha256("\n".join([text, header, *options, str(version)]).encode()).hexdigest()[:32]
    path = _cache_folder() / f"{digest}.cubin"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if kept.startswith(b"\x7fELF"):
            return kept
    program = _checked(
        nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 1, [header.encode()], [HEADER.encode()]), "NVRTC"
    )
    status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    if int(status) != 0:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC"))
        nvrtc.nvrtcGetProgramLog(program, log)
        said = " ".join(log.decode(errors="replace").strip("\0 \n").split())[:300]
        raise ConfigError(f"a kernel does not compile for {architecture}: {said}; set GRACE_KERNELS=triton")
    cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC"))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "NVRTC")
    nvrtc.nvrtcDestroyProgram(program)
    _keep(path, cubin)
    return cubin


def _cache_folder() -> Path:
    return cache_folder() / "cubin"


def _keep(path: Path, cubin: bytes) -> None:
    """Into the cache if it can be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as made:
            made.write_bytes(cubin)


class Kernel:
    """A function of a cubin, loaded on the current GPU.

    Args:
        early: it may be launched while the kernel before it still runs, whose end its text waits for.
    """

    def __init__(self, cubin: bytes, name: str, early: bool) -> None:
        from cuda.bindings import driver

        _take_context()
        self._module = _checked(driver.cuModuleLoadData(cubin), "loading a kernel")
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()), "loading a kernel")
        self._launch = driver.cuLaunchKernelEx
        self._shared_bytes = 48 << 10
        attributes = []
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes = [attribute]
        self._one_at_a_time = threading.Lock()
        self._config = driver.CUlaunchConfig()
        self._config.attrs, self._config.numAttrs = attributes, len(attributes)

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[torch.Tensor | int | None],
        shared_bytes: int = 0,
    ) -> None:
        """Queue it on the current stream. Tensors are passed as addresses (None: 0), numbers as int32;
        ``shared_bytes``: of a block, beside those that the text declares."""
        values: list[int] = []
        types: list[Any] = []
        for argument in arguments:
            if isinstance(argument, int):
                values.append(argument)
                types.append(ctypes.c_int)
            else:
                values.append(0 if argument is None else argument.data_ptr())
                types.append(ctypes.c_void_p)
        if shared_bytes > self._shared_bytes:
            self._allow(shared_bytes)
        config = self._config
        with self._one_at_a_time:  # the configuration is made once: making it takes as long as launching
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
            config.sharedMemBytes, config.hStream = shared_bytes, torch.cuda.current_stream().cuda_stream
            launched = self._launch(config, self._function, (tuple(values), tuple(types)), 0)
        _checked(launched, "launching a kernel")

    def _allow(self, shared_bytes: int) -> None:
        """More than every GPU has must be asked for, once."""
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(
            (*driver.cuFuncSetAttribute(self._function, attribute, shared_bytes), None), "asking for shared memory"
        )
        self._shared_bytes = shared_bytes


def _take_context() -> None:
    """Make torch's context the current one: in a thread that has not used the GPU yet there is none."""
    from cuda.bindings import driver

    torch.cuda.init()
    if int(_checked(driver.cuCtxGetCurrent(), "asking for the GPU's context")) == 0:
        device = _checked(driver.cuDeviceGet(torch.cuda.current_device()), "asking for the GPU")
        _checked(
            driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(device), "taking the GPU")), "taking it"
        )


@functools.cache
def load_kernel(file: str, name: str, defines: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """The kernel of a file of this folder, compiled for a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    # Warpgroup instructions are of sm_90a alone; code for it runs on every Hopper GPU.
    suffix = "a" if (major, minor) == (9, 0) else ""
    early = starts_early(device)
    text = (FOLDER / file).read_text(encoding="utf-8")
    macros = {**dict(defines), "EARLY_START": early}
    return Kernel(compile_text(text, f"sm_{major}{minor}{suffix}", macros), name, early)
