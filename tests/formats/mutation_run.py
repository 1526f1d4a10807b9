"""Runs damaged folders through every public way of reading one, in a process that may be watched and may die.

    python mutation_run.py ROOT FIRST STOP STEP      ROOT/bases as of mutation_bases.py; prints one JSON object

What must hold of each case: an error of ``FormatError`` or ``CheckpointError`` in one line, or a model; what was read
is what the certificate says, or is named by it; nothing outside of the folder is opened, nothing is written but where
``pack`` was told to, nothing hangs, and memory has a limit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forked_sidecars import ForkedSidecars
from mutation_bases import read_bases
from mutation_watch import Hang, Watch, cap_memory, fault_of
from mutations import Case, Change, Odd, case

from grace_vlm.checkpoint.manifest import changed_files
from grace_vlm.errors import CheckpointError, FormatError
from grace_vlm.formats import sidecar
from grace_vlm.formats.certificate import certify, write_certificate
from grace_vlm.formats.converter import CERTIFICATE, ModelContent
from grace_vlm.formats.gguf_values import parsed_config
from grace_vlm.formats.inspect import inspect_folder
from grace_vlm.formats.lazy import spec_of
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import converters, read_model
from grace_vlm.formats.verify import verify, verify_certificate
from grace_vlm.models.llava_layout import is_original_llava

Snapshot = dict[str, tuple[str, torch.Tensor]]
MAX_FAILURES = 60
_CONVERTED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def snapshot(content: ModelContent) -> Snapshot:
    """Every codes, scale and dense tensor by name, with the scheme; touches all that the content offers."""
    found: Snapshot = {}
    for name in content.linears:
        tensor = content.quantized[name]
        found[f"{name}.codes"] = (tensor.scheme.name, tensor.codes)
        found[f"{name}.scale"] = ("", tensor.scale)
    for name in content.baked:
        content.baked[name]
    for name in content.dense:
        tensor, spec = content.dense[name], spec_of(content.dense, name)
        assert (tensor.dtype, tuple(tensor.shape)) == tuple(spec), f"{name} is {tensor.dtype}, not as {spec}"
        found[name] = ("", tensor)
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or (a.dtype != b.dtype and not (a.is_floating_point() and b.is_floating_point())):
        return False
    if not a.is_floating_point():
        return a.contiguous().view(-1).view(torch.uint8).tolist() == b.contiguous().view(-1).view(torch.uint8).tolist()
    return torch.equal(a.double().nan_to_num(7e300), b.double().nan_to_num(7e300))


def same(a: Snapshot, b: Snapshot) -> bool:
    return a.keys() == b.keys() and all(a[name][0] == b[name][0] and _same(a[name][1], b[name][1]) for name in a)


class Runner:
    """Reads one case after the other; ``failures`` are (number, description, what was wrong)."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work, self.out = root, work, work / "made" / "out"
        self.bases = read_bases(root / "bases")
        self.counts: Counter[str] = Counter()
        self.failures: list[tuple[int, str, str]] = []
        self.server = ForkedSidecars(sidecar._run_child)
        sidecar._run_child = self.server.run
        self.wanted: dict[str, Snapshot] = {}
        self.certificates: dict[str, Path] = {}
        self.edited: dict[str, list[str]] = {}
        for name in ("folders", "made/out", "made/tmp", "certificates"):
            (work / name).mkdir(parents=True)
        tempfile.tempdir = str(work / "made" / "tmp")
        for base, files in self.bases.items():
            content = read_model(root / "bases" / base)
            self.wanted[base] = snapshot(content)
            (work / "certificates" / base).mkdir()
            write_certificate(work / "certificates" / base, certify(content))
            self.certificates[base] = work / "certificates" / base / CERTIFICATE
            self.edited[base] = changed_files(root / "bases" / base)
            for path, raw in files.items():
                self.put(work / "folders" / base / path, raw)
        for model_type in ("qwen3_vl", "qwen2_vl", "qwen2_5_vl", "llava"):  # imported here, so that no case waits
            parsed_config({"model_type": model_type})
        self.layouts = tuple(converters())
        readable = [work / "folders", root / "bases", work / "certificates"]
        self.watch = Watch(readable, [work / "made"])
        cap_memory()

    def put(self, path: Path, change: Change) -> None:
        """Make ``path`` be what ``change`` says, whatever stands there."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(change, bytes):
            path.write_bytes(change)
        elif change is not None and change.kind == "folder":
            path.mkdir()
        elif change is not None and change.kind == "fifo":
            os.mkfifo(path)
        elif change is not None:
            path.symlink_to(change.target)

    def restore(self, base: str, changes: dict[str, Change]) -> None:
        """The base as it was, also where a file of a folder stood in the place of the folder."""
        folder, files = self.work / "folders" / base, self.bases[base]
        for path in changes:
            self.put(folder / path, None)
        for path in changes:
            for own in files:
                if own == path or own.startswith(f"{path}/"):
                    self.put(folder / own, files[own])
        for parent in {(folder / path).parent for path in changes} - {folder}:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def run(self, one: Case) -> None:
        folder = self.work / "folders" / one.base
        changes = {
            path: Odd(c.kind, c.target.format(canary=self.root / "canary" / one.base)) if isinstance(c, Odd) else c
            for path, c in one.changes.items()
        }
        for path, change in changes.items():
            self.put(folder / path, change)
        try:
            with self.watch.watching() as seen:
                self._read(one, folder)
            for what in seen[:3]:
                self.fail(one, what)
        except (Hang, Exception) as error:
            self.watch.on = False
            where = " < ".join(
                f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-6:-1]
            )
            self.fail(one, f"{type(error).__name__}: {str(error)[:300]} ({where})")
        finally:
            self.restore(one.base, changes)
            if any(self.out.iterdir()):
                shutil.rmtree(self.out)
                self.out.mkdir()

    def fail(self, one: Case, what: str) -> None:
        self.failures.append((one.number, f"{one.base}: {one.description}", what))

    def _attempt(self, one: Case, what: str, function: Callable[[], Any]) -> Any:
        """Its result, or None after an error that a user may see."""
        try:
            return function()
        except (FormatError, CheckpointError) as error:
            if fault := fault_of(error):
                self.fail(one, f"the error of {what} {fault}")
            return None

    def _read(self, one: Case, folder: Path) -> None:
        self.counts["cases"] += 1
        rng = random.Random(-1 - one.number)
        content = self._attempt(one, "read_model", lambda: read_model(folder))
        found = None if content is None else self._attempt(one, "a tensor", lambda: snapshot(content))
        readable = content is not None and found is not None
        self.counts["read"] += readable
        if rng.random() < 0.2:
            self._attempt(one, "inspect", lambda: inspect_folder(folder))
        if rng.random() < 0.1:
            self._attempt(one, "its own certificate", lambda: verify_certificate(folder))
        if not readable and rng.random() < 0.8:
            return
        equal = readable and same(found, self.wanted[one.base])
        self.counts["read, and another model"] += readable and not equal
        if equal and rng.random() < 0.6:
            return
        stated = self._attempt(
            one, "verify_certificate", lambda: verify_certificate(folder, self.certificates[one.base])
        )
        # Of other files it may name those that were damaged, or edited when the base was made, and no others.
        damaged = {f"file {path}" for path in (*one.changes, *self.edited[one.base])}
        tensors = None if stated is None else [name for name in stated[1] if name not in damaged]
        if tensors is not None and (tensors == []) is not equal:
            self.fail(
                one, f"read_model {'gives' if equal else 'does not give'} the base; the certificate names {tensors}"
            )
        if rng.random() < 0.15:
            base = self.root / "bases" / one.base
            report = self._attempt(one, "verify", lambda: verify(base, folder))
            if report is not None and report.equal and not self._alike(found, one.base):
                self.fail(one, "verify finds no difference to the base, and there is one")
        # Only a conversion looks into the configuration and the tokenizer.
        if readable and rng.random() < (0.2 if any(path in _CONVERTED for path in one.changes) else 0.04):
            self._pack(one, folder, content, found, rng)

    def _alike(self, found: Snapshot | None, base: str) -> bool:
        """As ``same``, but an integer's width is no difference to ``verify``, which compares values."""
        wide = {n: (s, t if t.is_floating_point() else t.to(torch.float64)) for n, (s, t) in (found or {}).items()}
        wanted = {
            n: (s, t if t.is_floating_point() else t.to(torch.float64)) for n, (s, t) in self.wanted[base].items()
        }
        return found is not None and same(wide, wanted)

    def _pack(self, one: Case, folder: Path, content: ModelContent, found: Snapshot, rng: random.Random) -> None:
        layout, out = rng.choice((*self.layouts, *["gguf"] * 4)), self.out / "packed"
        rounds = rng.random() < 0.5
        done = self._attempt(one, f"pack to {layout}", lambda: pack(folder, out, layout, allow_rounding=rounds))
        if done is None:
            if left := [path.name for path in out.parent.iterdir()]:
                self.fail(one, f"pack to {layout} left {left}")
            return
        self.counts["packed"] += 1
        if not rounds and not is_original_llava(content.config) and not same(snapshot(read_model(out)), found):
            self.fail(one, f"pack to {layout} wrote another model")
        if verify_certificate(out)[1]:
            self.fail(one, f"pack to {layout} wrote a wrong certificate")


def main(root: Path, first: int, stop: int, step: int) -> None:
    torch.set_num_threads(1)
    work, begun = root / f"work-{first}-{os.getpid()}", time.monotonic()
    runner = Runner(root, work)
    ready = time.monotonic()
    with open(root / f"at-{first}", "wb", buffering=0) as progress:
        for number in range(first, stop, step):
            os.pwrite(progress.fileno(), b"%-12d" % number, 0)
            runner.run(case(number, runner.bases))
            if len(runner.failures) > MAX_FAILURES:
                break
    runner.server.close()
    shutil.rmtree(work)
    seconds = {"start": ready - begun, "cases": time.monotonic() - ready}
    print(json.dumps({"counts": runner.counts, "failures": runner.failures, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(text) for text in sys.argv[2:5]))
