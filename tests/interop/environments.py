"""Environments with other people's programs and without ours, and what the tests here share."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
NUM_BYTES_FREE = 8 * 10**9


def pinned_versions(lock: str) -> list[str]:
    """The ``name==version`` of every requirement of a lock file, without extras, hashes, markers and comments."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?(==[A-Za-z0-9._+!-]+)", lock, flags=re.MULTILINE)
    return ["".join(pair) for pair in found]


def clean_variables() -> dict[str, str]:
    """The environment without anything that could lend our packages to another interpreter."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


class Base:
    """One environment with the packages that are most of every other's bytes, and nothing of ours: it is made when
    somebody needs it, and once."""

    packages = ("torch", "torchvision", "transformers", "accelerate", "pillow")

    def __init__(self, root: Path) -> None:
        self.root = root
        self._site: Path | None = None

    def site(self) -> Path:
        """Its folder of packages."""
        if self._site is None:
            self._site = site_of(install(self.root, self.packages))
        return self._site

    def remove(self) -> None:
        shutil.rmtree(self.root / "venv", ignore_errors=True)


def environment(
    root: Path, variable: str, packages: Sequence[str], base: Base | None = None, *, pinned: bool = True
) -> Iterator[Path]:
    """The interpreter that ``variable`` names, or that of a new virtual environment in ``root``, gone afterwards.

    A body of a fixture. Five environments of 5 GB each would fill a disk, and pytest keeps the folders of three runs.

    Args:
        packages: what is installed. base: what is there before. pinned: in the versions of ``requirements.lock``, where
            that has them.
    """
    if given := os.environ.get(variable):
        yield Path(given)
        return
    try:
        yield install(root, packages, base, pinned=pinned)
    finally:
        shutil.rmtree(root / "venv", ignore_errors=True)


def install(root: Path, packages: Sequence[str], base: Base | None = None, *, pinned: bool = True) -> Path:
    """The interpreter of a new virtual environment with ``packages``."""
    site = None if base is None else base.site()
    if (free := shutil.disk_usage(root).free) < NUM_BYTES_FREE:
        raise RuntimeError(f"{root} has {free / 1e9:.1f} GB free; an environment needs {NUM_BYTES_FREE / 1e9:.0f}")
    venv.create(root / "venv", with_pip=True)
    python = root / "venv" / "bin" / "python"
    if site is not None:
        (site_of(python) / "base.pth").write_text(f"{site}\n")
    constraints = root / "constraints.txt"
    pins = pinned_versions((REPOSITORY / "requirements.lock").read_text(encoding="utf-8")) if pinned else []
    constraints.write_text("\n".join(pins) + "\n")
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints, *packages]
    subprocess.run(command, check=True, env=clean_variables(), timeout=1200)
    return python


def site_of(python: Path) -> Path:
    """The folder of packages of a virtual environment."""
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    return site


def run_script(python: Path, script: Path, *arguments: object, timeout: int = 1200, **variables: str) -> str:
    """What ``script`` prints, run from a folder that holds nothing of ours; its last words if it fails."""
    command = [python, script, *map(str, arguments)]
    own = clean_variables() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"} | variables
    ran = subprocess.run(command, capture_output=True, text=True, env=own, cwd="/", timeout=timeout)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def record(name: str, report: Any) -> None:
    """Print what was found; with ``GRACE_WRITE_DOCS=1`` keep it in ``results/`` too."""
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if os.environ.get("GRACE_WRITE_DOCS"):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def format_tests(module: str) -> Any:
    """A module of ``tests/formats``, which no package holds."""
    return module_of("tests/formats", module)


def module_of(folder: str, module: str) -> Any:
    """A module of a folder of the repository that is no package."""
    sys.path.insert(0, str(REPOSITORY / folder))
    return importlib.import_module(module)
