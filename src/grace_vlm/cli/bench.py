"""``grace bench``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import typer

from grace_vlm.errors import ConfigError

HELP = """Run a benchmark of the repository; without a name, list them.

What stands behind the name goes to the benchmark: grace bench loss --help.

Example: grace bench loss --cases n1024,n8192 --out loss.csv"""
SETTINGS = {"allow_extra_args": True, "allow_interspersed_args": False}
"""Options behind the name are the script's, ``--help`` too."""


def bench(
    context: typer.Context,
    name: str = typer.Argument(None, help="benchmarks/bench_NAME.py; what follows are its options."),
) -> None:
    folder = scripts_folder()
    found = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    if name is None and found:
        width = max(map(len, found)) + 2
        print("\n".join(f"{one:{width}}{purpose(folder / f'bench_{one}.py')}" for one in found))
        return
    if name is not None and name in found:
        script = folder / f"bench_{name}.py"
        raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args], check=False).returncode)
    if found:
        raise ConfigError(f"there is no benchmark {name!r}; there are {', '.join(found)}")
    raise ConfigError(
        f"benchmarks/bench_{name or 'NAME'}.py is not here: the package was imported from {Path(__file__).parents[1]}, "
        "and benchmarks are no part of it; run it in a clone of the repository"
    )


def scripts_folder() -> Path:
    """``benchmarks`` at the root of the checkout that the package is imported from; it need not exist."""
    return Path(__file__).resolve().parents[3] / "benchmarks"


def purpose(script: Path) -> str:
    """First line of a script's docstring; nothing is run."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
