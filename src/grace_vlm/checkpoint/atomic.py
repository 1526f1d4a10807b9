"""Publish or nothing: the one module that makes files durable.

A folder is written beside its target, sealed, and renamed:

    .partial-NAME-PID/      everything is written here
    chmod 0666 & ~umask     safetensors leaves 0600, whatever the umask
    fsync every file        the data, before any name points to it
    manifest.json, .sha256  see manifest.py; then fsync them and every folder
    rename -> NAME          the publication
    fsync the parent        the name itself is now durable

With ``overwrite`` the old folder steps aside first. Killed at any instant, this is what is found:

    1. NAME (old), .partial-NAME-PID           -> old is in force; sweep deletes the partial
    2. .replaced-NAME-PID, .partial-NAME-PID   -> between the two renames; sweep puts the old one back
    3. NAME (new), .replaced-NAME-PID          -> new is in force; sweep deletes the old one
    4. NAME (new), .partial-NAME-PID           -> the old one, renamed once more, was being deleted; sweep goes on

``sweep_partials`` is that recovery. It tells a live writer from a dead one by its process id, so call it only under
the folder's lock (lock.py), on the machine that writes there. If the parent's fsync fails, after the rename, the new
folder is visible but may not survive a power cut: that is said, and the old one is kept until the next sweep.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grace_vlm.checkpoint.manifest import MANIFEST, MARKER, list_files, write_manifest
from grace_vlm.errors import CheckpointError

_LEFTOVER = re.compile(r"\.(partial|replaced)-(.+)-([0-9]{1,9})")
_ENVIRONMENT_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "a file is larger than this process may write",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTEMPTY: "another process wrote there",
}
_active: set[Path] = set()
"""Stages open in this process. A leftover with our own pid that is not here is a dead namesake's (containers)."""


def _beside(final: Path, kind: str) -> Path:
    return final.parent / f".{kind}-{final.name}-{os.getpid()}"


def _errno_of(error: OSError | SafetensorError) -> int | None:
    """The errno, also of the Rust errors that carry it only in their text."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error ([0-9]+)\)", str(error))
    return int(match[1]) if match else None


def _concerns(filename: object, path: Path) -> bool:
    """True if an error about ``filename`` is about writing ``path``: no name, a part of it, its stage, a parent."""
    if not isinstance(filename, str | bytes):
        return True
    where = Path(os.path.abspath(os.fsdecode(filename)))
    targets = (path, _beside(path, "partial"), _beside(path, "replaced"))
    return path.is_relative_to(where) or any(where.is_relative_to(target) for target in targets)


@contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what a disk can do to a write of ``path`` into one line of ``CheckpointError``.

    Errors of the program, and errors of files that lie elsewhere (a source being read), pass unchanged.
    """
    path = Path(os.path.abspath(path))
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _ENVIRONMENT_ERRORS.get(_errno_of(error) or 0)
        if reason is None or not _concerns(getattr(error, "filename", None), path):
            raise
        needs = f" ({needed_bytes:,} bytes needed)" if needed_bytes is not None else ""
        raise CheckpointError(f"cannot write {path}: {reason}{needs}; what was there before is untouched") from error


def make_folder(path: Path) -> None:
    """A folder and those above it, if they are not there; ``CheckpointError`` where that cannot be."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def require_free_space(path: Path, needed_bytes: int) -> None:
    """Raise ``CheckpointError`` if the file system that holds (or will hold) ``path`` has too little room."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"cannot write {path}: {needed_bytes:,} bytes needed, {free_bytes:,} free; make room or write elsewhere"
        )


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(final: Path, overwrite: bool) -> None:
    """``CheckpointError`` if a folder must not be published at ``final``.

    Even with ``overwrite`` only an empty folder or one with a manifest is replaced: a mistyped path must not cost
    someone's photographs.
    """
    if not final.exists() and not final.is_symlink():
        return
    if final.is_symlink() or not final.is_dir():
        raise CheckpointError(f"{final} exists and is not a folder; choose another path")
    if not overwrite:
        raise CheckpointError(f"{final} already exists; choose another path or pass --overwrite")
    ours = (final / MANIFEST).is_file() or (final / MARKER).is_file()
    if not ours and any(final.iterdir()):
        raise CheckpointError(
            f"{final} was not published by grace (no {MANIFEST}); delete it yourself or choose another path"
        )


def refuse_overlap(source: Path, final: Path) -> None:
    """``CheckpointError`` if one of two folders lies in the other: publishing would read, or delete, what it makes."""
    read, written = (Path(os.path.realpath(path)) for path in (source, final))
    if written.is_relative_to(read) or read.is_relative_to(written):
        where = "is" if read == written else "lies inside" if written.is_relative_to(read) else "holds"
        raise CheckpointError(f"{final} {where} {source}; choose a folder elsewhere")


def _discard(path: Path) -> None:
    """Delete a file or folder that nobody will miss."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a published folder in one visible step: it becomes a partial first, so nobody sees half of it."""
    doomed = _beside(folder, "partial")
    _discard(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _seal(stage: Path) -> None:
    """Modes, fsync, manifest, fsync: after this the stage may be renamed."""
    for name in (MANIFEST, MARKER):  # of a folder that was copied whole
        (stage / name).unlink(missing_ok=True)
    probe = stage / MARKER
    probe.touch(mode=0o666)
    mode = probe.stat().st_mode & 0o777  # 0666 & ~umask, without touching the process-wide umask
    probe.unlink()
    files = list_files(stage).values()
    for path in files:
        path.chmod(mode)
        fsync_path(path)
    write_manifest(stage)
    for path in (stage / MANIFEST, stage / MARKER, *(Path(parent) for parent, _, _ in os.walk(stage))):
        fsync_path(path)


def _swap_in(stage: Path, final: Path) -> None:
    """Rename the sealed stage to ``final``; an old ``final`` steps aside and is deleted last."""
    aside = _beside(final, "replaced") if final.exists() else None
    published = False
    if aside is not None:
        _discard(aside)
        os.rename(final, aside)
    try:
        os.rename(stage, final)
        published = True
    finally:
        if aside is not None and not published:
            os.rename(aside, final)
    try:
        fsync_path(final.parent)
        if aside is not None:
            doomed = _beside(final, "partial")
            os.rename(aside, doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(
            f"{final} is written, but the disk does not confirm that it will last ({error.strerror}); "
            "check the disk before you rely on it"
        ) from error


@contextmanager
def publish_folder(final: Path, *, overwrite: bool = False, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a staging folder that becomes ``final`` if the block ends well, and vanishes if it does not.

    Args:
        final: the folder to make; its parents are made too.
        overwrite: replace a published (or empty) folder of that name.
        needed_bytes: what will be written, if known: checked against the free space first and named in errors.

    Raises:
        CheckpointError: the target exists, or the disk refuses. An older ``final`` is then untouched.
    """
    final = Path(os.path.abspath(final))
    refuse_existing(final, overwrite)
    stage = _beside(final, "partial")
    try:
        with disk_errors(final, needed_bytes):
            final.parent.mkdir(parents=True, exist_ok=True)
            if needed_bytes is not None:
                require_free_space(final, needed_bytes)
            _discard(stage)
            stage.mkdir()
            _active.add(stage)
            yield stage
            refuse_existing(final, overwrite)
            _seal(stage)
            _swap_in(stage, final)
    finally:
        _active.discard(stage)
        shutil.rmtree(stage, ignore_errors=True)


def write_json_atomic(path: Path, content: Any) -> None:
    """``write_bytes_atomic`` of ``content`` as JSON. Refuses NaN."""
    write_bytes_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, so that a reader finds the old file or the new one, whatever happens.

    Raises:
        CheckpointError: the disk refuses; the old file is then untouched.
    """
    path = Path(os.path.abspath(path))
    stage = _beside(path, "partial")
    try:
        with disk_errors(path, len(content)):
            with stage.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(stage, path)
            fsync_path(path.parent)
    finally:
        with suppress(OSError):
            stage.unlink()


def is_alive(pid: int) -> bool:
    """True if a process with this id runs on this machine (whoever owns it)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep_partials(parent: Path, only: str | None = None) -> list[Path]:
    """Recover from killed writers in ``parent``: put back what stepped aside, delete what was half-written.

    Args:
        only: leftovers of the folder of this name; None: of all.

    Returns:
        The leftovers that were dealt with, for the log. Those of live processes stay.
    """
    swept: list[Path] = []
    with disk_errors(parent):
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            match = _LEFTOVER.fullmatch(path.name)
            if not match or path in _active or only not in (None, match[2]):
                continue
            kind, name, pid = match[1], match[2], int(match[3])
            if pid != os.getpid() and is_alive(pid):
                continue
            if kind == "replaced" and not (parent / name).exists():
                os.rename(path, parent / name)
            else:
                _discard(path)
            swept.append(path)
        if swept:
            fsync_path(parent)
    return swept
