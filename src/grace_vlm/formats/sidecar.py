"""``qat_quantized_weights.bin``, the official pickle, read in a child process and written without being held in memory.

It is a dict of tensors, ``<module>.{weight,log_scale,bias}``, as ``torch.save`` writes them: a zip of ``data.pkl`` and
one uncompressed entry a tensor. This is the only file of the product that opens a pickle:

    parent    the zip's directory: stored entries only, no more content than bytes, at most ``max_bytes``
    child     address space capped; torch.load(weights_only=True); strict schema; writes log_scales and biases to a
              safetensors file, and of each weight dtype, shape and digest, since the same weight lies beside it
    parent    reads that file; no object of the pickle ever lives in the process that runs the model

``python -m grace_vlm.formats.sidecar`` is the child.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grace_vlm.errors import FormatError
from grace_vlm.formats.lazy import TensorSpec, ahead, spec_of
from grace_vlm.formats.shards import write_bytes
from grace_vlm.formats.values import digest

SIDECAR = "qat_quantized_weights.bin"
ROOM_BYTES = 1 << 30
"""Address space that the child may take beyond the file's own size."""
_ALIGNMENT = 64
_MAPPED_BYTES = 256 << 20
_SECONDS, _BYTES_PER_SECOND = 120, 20_000_000
_UNPICKLING = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OSError,
    OverflowError,
)


@dataclass(frozen=True)
class Sidecar:
    """What the file says: small tensors as they are, weights by dtype, shape and digest."""

    log_scales: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    weights: dict[str, tuple[TensorSpec, str]]


def _check_archive(path: Path, max_bytes: int) -> None:
    """Refuse what could unpack to more than is on the disk, before anything is unpacked."""
    size = path.stat().st_size
    if size > max_bytes:
        raise FormatError(f"{path} has {size:,} bytes; the model's weights allow at most {max_bytes:,}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FormatError(f"{path} is no torch archive: {error}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FormatError(f"{path} holds compressed entries, which torch.save never writes; it is not opened")
    if sum(entry.file_size for entry in entries) > size:
        raise FormatError(f"{path} claims more content than it has bytes; it is not opened")


def load_pickle(path: Path, max_bytes: int) -> dict[str, torch.Tensor]:
    """The pickle's dict, with nothing in it but plain CPU tensors; the child's part, never called by the parent.

    Raises:
        FormatError: too large, compressed, not loadable with ``weights_only``, or anything beyond the schema.
    """
    _check_archive(path, max_bytes)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNPICKLING as error:
        # Torch's own words go on to recommend opening it all the same.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {asked[1]} beside tensors, which could run code" if asked else "is no dict of plain tensors"
        raise FormatError(
            f"{path} {what} (torch.load with weights_only refused it); it is not opened: get it from its source again"
        ) from error
    if type(found) is not dict or not found:
        raise FormatError(f"{path} holds a {type(found).__name__}; expected a dict of tensors")
    for name, tensor in found.items():
        part = name.rpartition(".")[2] if isinstance(name, str) else ""
        plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.is_contiguous()
        if part not in ("weight", "log_scale", "bias") or not plain or tensor.device.type != "cpu":
            raise FormatError(
                f"{path} holds {name!r} ({type(tensor).__name__}); expected plain <module>.weight, .log_scale, .bias"
            )
        if not tensor.is_floating_point():
            raise FormatError(f"{path} holds {name} of {tensor.dtype}; expected floating point")
    return found


def read_sidecar(path: Path, max_bytes: int) -> Sidecar:
    """Read the pickle in a child process whose address space is capped.

    Raises:
        FormatError: what ``load_pickle`` refuses, or the child needed more memory or time than such a file can.
    """
    _check_archive(path, max_bytes)
    seconds = _SECONDS + path.stat().st_size // _BYTES_PER_SECOND
    with tempfile.TemporaryDirectory(prefix="grace-sidecar-") as folder:
        out = Path(folder) / "small.safetensors"
        try:
            ran = _run_child([str(path.resolve()), str(out), str(max_bytes)], seconds, folder)
        except subprocess.TimeoutExpired:
            raise FormatError(f"{path} could not be read in {seconds} s; it is no sidecar of this model") from None
        if ran.returncode == 2:
            raise FormatError(ran.stderr.strip().splitlines()[-1])
        if ran.returncode != 0 or not out.is_file():
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            raise FormatError(
                f"{path} could not be read: the process that opens it, which may take {max_bytes + ROOM_BYTES:,} "
                f"bytes of memory, ended with status {ran.returncode} ({last[:200]})"
            )
        return _read_small(out)


def _run_child(arguments: list[str], seconds: float, folder: str) -> subprocess.CompletedProcess[str]:
    """``main(arguments)`` in a process of its own; ``TimeoutExpired`` if it takes longer.

    It runs in ``folder``, an empty one of ours, and imports nothing from where it stands (-P): the user may stand in
    the very folder that is read, and a stranger's ``torch.py`` must not be the child's.
    """
    command = [sys.executable, "-P", "-m", __name__, *arguments]
    paths = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=seconds, cwd=folder, env=own
    )


def _read_small(path: Path) -> Sidecar:
    with safe_open(path, framework="pt") as handle:
        stated = json.loads(handle.metadata()["weights"])
        # A copy: what safetensors hands out is the mapped file, which is gone in a moment.
        small = {name: handle.get_tensor(name).clone() for name in list(handle.keys())}
    weights = {n: (TensorSpec(getattr(torch, d), tuple(shape)), h) for n, (d, shape, h) in stated.items()}
    parts = {
        part: {name.rpartition(".")[0]: t for name, t in small.items() if name.endswith(f".{part}")}
        for part in ("log_scale", "bias")
    }
    return Sidecar(parts["log_scale"], parts["bias"], weights)


def _cap_memory(room_bytes: int) -> None:
    """Let this process grow by ``room_bytes`` at most."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    status = Path("/proc/self/statm")
    used = int(status.read_text().split()[0]) * resource.getpagesize() if status.is_file() else 16 << 30
    resource.setrlimit(resource.RLIMIT_AS, (used + room_bytes, used + room_bytes))


def _child(path: Path, out: Path, max_bytes: int) -> None:
    torch.set_num_threads(1)
    _cap_memory(path.stat().st_size + ROOM_BYTES)
    found = load_pickle(path, max_bytes)
    small = {name: tensor.clone() for name, tensor in found.items() if not name.endswith(".weight")}
    names = [name for name in found if name.endswith(".weight")]
    parts: list[list[str]] = [[]]
    mapped = 0
    for name in names:
        if mapped > _MAPPED_BYTES:
            parts.append([])
            mapped = 0
        parts[-1].append(name)
        mapped += found[name].nbytes
    weights = {}
    for chosen in parts:
        # The file is mapped, and pages that were read count as this process's memory until all tensors are gone.
        del found
        found = load_pickle(path, max_bytes)
        with ThreadPoolExecutor(max_workers=2) as pool:
            digests = list(pool.map(digest, [found[name] for name in chosen]))
        for name, found_digest in zip(chosen, digests, strict=True):
            dtype = str(found[name].dtype).removeprefix("torch.")
            weights[name.removesuffix(".weight")] = (dtype, list(found[name].shape), found_digest)
    save_file(small, out, metadata={"weights": json.dumps(weights)})


class _Pickler(pickle.Pickler):
    """Pickles tensors as ``torch.save`` does: by reference to numbered storages, which are written beside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self._num_storages = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.storage.TypedStorage):
            return None
        key, self._num_storages = str(self._num_storages), self._num_storages + 1
        return ("storage", getattr(torch, value._pickle_storage_type()), key, "cpu", value._size())


def _add(archive: zipfile.ZipFile, name: str, num_bytes: int) -> Any:
    """Open an entry whose bytes begin at a multiple of 64, as torch's own do: so they can be mapped."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = num_bytes
    position = archive.fp.tell() + 30 + len(entry.filename) + 4  # type: ignore[union-attr]
    padding = -position % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return archive.open(entry, "w")


def write_sidecar(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """What ``torch.save(dict(tensors), path)`` writes, with two tensors in memory at a time."""
    specs = {name: spec_of(tensors, name) for name in tensors}
    pickled = io.BytesIO()
    # Memory that is never touched is never taken: only shapes and dtypes go into the pickle.
    _Pickler(pickled).dump({name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
            with _add(archive, name, len(content)) as file:
                file.write(content)
        for number, (name, tensor) in enumerate(ahead(tensors)):
            with _add(archive, f"data/{number}", specs[name].num_bytes) as file:
                write_bytes(file, tensor)
        with _add(archive, "version", 2) as file:
            file.write(b"3\n")


def main(arguments: list[str]) -> int:
    """The child: (pickle, file to write, most bytes of the pickle) -> exit status."""
    try:
        _child(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
    except FormatError as refused:
        sys.stderr.write(" ".join(str(refused).split()) + "\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
