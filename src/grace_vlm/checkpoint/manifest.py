"""The sha256 of every file of a published folder: what none of the tensor formats checks for itself.

safetensors takes any flipped payload bit silently (67,712 of 67,712 when we tried). So a published folder ends with

    manifest.json      {"format_version": 1, "files": {"model.safetensors": {"bytes": 123, "sha256": "..."}, ...}}
    manifest.sha256    "<sha256 of manifest.json>  manifest.json\\n", which ``sha256sum -c`` also reads

"Complete" means that the manifest matches its marker and every file is there with its length (``is_complete``, no
hashing). "Verified" means that every byte was hashed again (``verify_manifest``). A published folder holds plain files
and folders only: a symbolic link could be changed behind the manifest's back.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.strict_json import read_object
from grace_vlm.errors import CheckpointError

MANIFEST = "manifest.json"
MARKER = "manifest.sha256"
FORMAT_VERSION = 1


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, Path]:
    """Relative posix name -> path of every file below ``folder`` but the manifest and its marker, sorted."""
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path} is not a plain file or folder; a published folder holds nothing else")
        found.update({Path(parent, name).relative_to(folder).as_posix(): Path(parent, name) for name in files})
    return {name: found[name] for name in sorted(found) if name not in (MANIFEST, MARKER)}


def _marker_text(manifest_sha256: str) -> bytes:
    return f"{manifest_sha256}  {MANIFEST}\n".encode()


def write_manifest(folder: Path) -> None:
    """Hash every file of ``folder`` and write the manifest, then its marker. Durability is the caller's (atomic.py)."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in list_files(folder).items()
    }
    text = json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_bytes(text.encode())
    (folder / MARKER).write_bytes(_marker_text(hashlib.sha256(text.encode()).hexdigest()))


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries, after its own hash was found to match the marker."""
    for name in (MANIFEST, MARKER):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: it was never completely written, or not by grace")
    actual, marker = sha256_file(folder / MANIFEST), (folder / MARKER).read_bytes()
    if marker != _marker_text(actual):
        expected = marker[:64].decode("ascii", "replace")
        raise CheckpointError(f"{folder / MANIFEST} is corrupt: sha256 is {actual}, {MARKER} says {expected!r}")
    manifest = read_object(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(
            f"{folder / MANIFEST} has format_version {manifest.get('format_version')!r}; "
            f"this grace reads {FORMAT_VERSION}: use the version that wrote it"
        )
    return manifest["files"]


def _check_presence(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """(entries, files) of a folder whose names and lengths are as the manifest says."""
    entries, files = _read_manifest(folder), list_files(folder)
    missing, extra = sorted(entries.keys() - files.keys()), sorted(files.keys() - entries.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its manifest lists")
    if extra:
        raise CheckpointError(f"{folder} holds {', '.join(extra)}, which its manifest does not list")
    for name, path in files.items():
        if path.stat().st_size != entries[name]["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {entries[name]['bytes']}")
    return entries, files


def verify_manifest(folder: Path) -> None:
    """Hash every byte of a published folder again.

    Raises:
        CheckpointError: naming the first file that is missing, not listed, of another length, or of another content
            (with both sha256).
    """
    entries, files = _check_presence(folder)
    for name, path in files.items():
        actual = sha256_file(path)
        if actual != entries[name]["sha256"]:
            raise CheckpointError(
                f"{path} is corrupt: sha256 is {actual}, its manifest says {entries[name]['sha256']}; "
                "use another copy or an earlier checkpoint"
            )


def changed_files(folder: Path, suffixes_left_out: tuple[str, ...] = ()) -> list[str]:
    """Files of a manifest that are gone or have another content, but those of some suffixes; [] without a manifest.

    Raises:
        CheckpointError: the manifest itself is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return []
    files = list_files(folder)  # what is there, not what a manifest may point to

    def is_same(name: str, entry: Any) -> bool:
        return isinstance(entry, dict) and name in files and sha256_file(files[name]) == entry.get("sha256")

    entries = _read_manifest(folder).items()
    return sorted(n for n, e in entries if Path(n).suffix not in suffixes_left_out and not is_same(n, e))


def is_complete(folder: Path) -> bool:
    """True if the manifest matches its marker and every listed file is there with its length. Hashes no payload."""
    try:
        _check_presence(folder)
    except (CheckpointError, OSError):
        return False
    return True
