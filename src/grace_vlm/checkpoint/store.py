"""Exact resume: one record of everything, one folder a step, the newest one that can be trusted.

    checkpoints/step-000012/
      masters.safetensors  log_scales.safetensors  optimizer_tensors.safetensors     one file a tensor field
      state.json                                                                     every other field
      manifest.json  manifest.sha256

Several processes write a file a tensor field each, ``masters-00001-of-00002.safetensors``, with their share of it; the
first one writes the rest and seals the folder when all have written.

``TrainState`` is the list of what a run is made of; the folder is derived from its fields, so a field cannot be
forgotten on one side. Codes are not in it: they follow from masters and log-scales. Numbers in ``state.json`` are
exact: Python writes a float so that it reads back as the same float.

Retention counts complete folders up to the step just saved, keeps the newest of them, and never touches what it
cannot read: a broken folder is evidence, and a later one belongs to a run that was resumed from an earlier step.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grace_vlm.checkpoint.atomic import disk_errors, publish_folder, remove_folder
from grace_vlm.checkpoint.manifest import is_complete, verify_manifest
from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import CheckpointError

FORMAT_VERSION = 2
_STEP_FOLDER = re.compile(r"step-([0-9]{6,})")
_JSON_ROOM_BYTES = 1 << 20
_MOST_PROCESSES = 1 << 16


@dataclass(frozen=True)
class TrainState:
    """Everything that decides the rest of a run. Tensors by parameter name; the rest is plain JSON.

    Args:
        step: optimizer steps done.
        masters: FP32 masters, and every other trained tensor; of several processes, this one's share.
        log_scales: FP32 log-scale of each quantized linear, (out, groups), and ``<name>#sign`` where it has one.
        optimizer_tensors: moments, named ``<parameter>.<moment>``.
        adaptive_weight: the controller's state.
        sampler: process ("0", "1", ...) -> epoch and cursor.
        rng: process -> ``capture_rng()``.
        fingerprint: what must be the same for a resume to be exact (``require_same``): config hash, world size,
            dtype, torch version, device name.
    """

    step: int
    masters: dict[str, torch.Tensor]
    log_scales: dict[str, torch.Tensor]
    optimizer_tensors: dict[str, torch.Tensor]
    adaptive_weight: dict[str, Any]
    sampler: dict[str, Any]
    rng: dict[str, Any]
    fingerprint: dict[str, Any]


class Processes(Protocol):
    """Who writes a checkpoint together (``train.ranks``)."""

    index: int
    count: int

    def of_first(self, value: Any) -> Any:
        """What process 0 gives."""
        ...

    def wait(self) -> None: ...


class _Alone:
    """One process."""

    index, count = 0, 1

    def of_first(self, value: Any) -> Any:
        return value

    def wait(self) -> None:
        pass


TENSOR_FIELDS = tuple(f.name for f in dataclasses.fields(TrainState) if "Tensor" in str(f.type))
JSON_FIELDS = tuple(f.name for f in dataclasses.fields(TrainState) if "Tensor" not in str(f.type))


def _state_text(state: TrainState, num_processes: int) -> str:
    """``state.json``. Refuses what JSON would change silently: NaN, integer keys, tuples."""
    content = {
        "format_version": FORMAT_VERSION,
        "num_processes": num_processes,
        **{name: getattr(state, name) for name in JSON_FIELDS},
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    if json.loads(text) != content:
        raise TypeError("TrainState holds something that JSON changes (integer keys, tuples); use strings and lists")
    return text + "\n"


def _file_name(field: str, index: int, count: int) -> str:
    return f"{field}.safetensors" if count == 1 else f"{field}-{index + 1:05d}-of-{count:05d}.safetensors"


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:06d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every step folder in ``root``, complete or not, oldest first."""
    found = [(match, path) for path in root.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def save_checkpoint(root: Path, step: int, state: TrainState, keep: int, processes: Processes | None = None) -> Path:
    """Publish ``root/step-NNNNNN``, then delete complete ones beyond the newest ``keep``.

    A folder of the same step, left by a run that was resumed from an earlier one, is replaced.

    Args:
        processes: who write it together, each its own share of the tensors; None: this one alone.

    Raises:
        CheckpointError: the disk refuses; every older checkpoint is then still there.
    """
    if keep < 1 or step != state.step:
        raise ValueError(f"keep {keep} must be at least 1, and step {step} the state's own ({state.step})")
    them = _Alone() if processes is None else processes
    final = step_folder(root, step)
    if them.index:
        with disk_errors(final):
            _write_tensors(Path(them.of_first(None)), state, them)
        them.wait()  # all have written
        them.wait()  # and it is sealed
        return final
    text = _state_text(state, them.count)
    groups = [getattr(state, name) for name in TENSOR_FIELDS]
    needed_bytes = them.count * sum(t.numel() * t.element_size() for group in groups for t in group.values())
    with disk_errors(final):
        if final.is_dir() and not is_complete(final):
            shutil.rmtree(final)
        with publish_folder(final, overwrite=True, needed_bytes=needed_bytes + len(text) + _JSON_ROOM_BYTES) as stage:
            them.of_first(str(stage))
            _write_tensors(stage, state, them)
            them.wait()
            (stage / "state.json").write_text(text, encoding="utf-8")
    them.wait()
    complete = [path for number, path in list_checkpoints(root) if number <= step and is_complete(path)]
    for path in complete[:-keep]:
        with disk_errors(path):
            remove_folder(path)
    return final


def _write_tensors(stage: Path, state: TrainState, processes: Processes) -> None:
    """A process's own files."""
    for name in TENSOR_FIELDS:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in getattr(state, name).items()}
        save_file(tensors, stage / _file_name(name, processes.index, processes.count))


def _require_fields(path: Path, stored: set[str], expected: set[str]) -> None:
    if stored != expected:
        raise CheckpointError(
            f"{path} does not fit this version of grace: missing {sorted(expected - stored) or 'nothing'}, "
            f"unknown {sorted(stored - expected) or 'nothing'}; use the version that wrote it"
        )


def load_checkpoint(path: Path) -> TrainState:
    """The state in ``path`` (of several processes: the first one's share), after every byte was hashed. Never falls
    back to another folder.

    Raises:
        CheckpointError: no such folder, a corrupt file (with both sha256), a missing or unknown field.
    """
    content, count = _verified_content(path)
    return _share(path, content, 0, count)


def load_shares(path: Path, index: int, count: int) -> list[TrainState]:
    """What process ``index`` of ``count`` needs of the state in ``path``: its own share if as many wrote it, else the
    shares of all that did. Hashed once; errors as for ``load_checkpoint``."""
    content, wrote = _verified_content(path)
    return [_share(path, content, number, wrote) for number in ([index] if wrote == count else range(wrote))]


def _verified_content(path: Path) -> tuple[dict[str, Any], int]:
    """(JSON fields, number of processes) of a folder whose every byte was hashed and whose files are all there."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint folder; expected something like checkpoints/step-000012")
    verify_manifest(path)
    content = read_object(path / "state.json")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}; this grace reads {FORMAT_VERSION}: use the version that wrote it"
        )
    count = content.pop("num_processes", None)
    if type(count) is not int or not 0 < count <= _MOST_PROCESSES:
        raise CheckpointError(f"{path / 'state.json'} says it is of {count!r} processes; it is damaged")
    files = {_file_name(name, number, count) for name in TENSOR_FIELDS for number in range(count)}
    _require_fields(path, {file.name for file in path.glob("*.safetensors")}, files)
    _require_fields(path, set(content), set(JSON_FIELDS))
    for name, value in content.items():
        if type(value) is not (int if name == "step" else dict):
            raise CheckpointError(f"{path / 'state.json'} holds a {type(value).__name__} as {name!r}; it is damaged")
    return content, count


def _share(path: Path, content: dict[str, Any], index: int, count: int) -> TrainState:
    try:
        groups: dict[str, Any] = {name: load_file(path / _file_name(name, index, count)) for name in TENSOR_FIELDS}
    except SafetensorError as error:
        raise CheckpointError(f"{path} holds a file that is no safetensors: {error}") from error
    return TrainState(**content, **groups)


def find_checkpoint(root: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose every byte verifies, and why each newer one was skipped.

    Returns:
        (folder or None, [(folder, reason), ...] newest first).
    """
    skipped: list[tuple[Path, str]] = []
    for _, path in reversed(list_checkpoints(root)):
        try:
            verify_manifest(path)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            continue
        except OSError as error:
            skipped.append((path, f"cannot read {path}: {error.strerror}"))
            continue
        return path, skipped
    return None, skipped


def require_same(expected: dict[str, Any], found: dict[str, Any], run: Path) -> None:
    """Refuse to resume under other circumstances than the checkpoint's.

    Args:
        expected: this run's fingerprint.
        found: the checkpoint's. run: the folder that it is in.

    Raises:
        CheckpointError: one line with every key that differs.
    """
    keys = sorted(k for k in expected.keys() | found.keys() if expected.get(k, "absent") != found.get(k, "absent"))
    if keys:
        diff = "; ".join(f"{k}: {found.get(k, 'absent')} then, {expected.get(k, 'absent')} now" for k in keys)
        how = " (num_threads: by OMP_NUM_THREADS)" if "num_threads" in keys else ""
        raise CheckpointError(f"{run} was begun otherwise ({diff}); restore this{how}, or remove that folder")
