"""Writes docs/recipes.md and docs/cli.md from the code: `make docs`. A test checks that they are up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMANDS = (
    "demo",
    "data prepare",
    "data check",
    "plan",
    "train",
    "quantize",
    "pack",
    "verify",
    "inspect",
    "eval",
    "chat",
    "compare",
    "doctor",
)


def recipes() -> str:
    """Every key of a recipe with its default."""
    from pydantic import BaseModel

    from grace_vlm.train.config import Recipe

    lines = [
        "# Recipes",
        "",
        "A recipe is YAML; `grace train RECIPE key=value ...` overrides single keys. Unknown keys are errors, and a",
        "default stands in one place only (`src/grace_vlm/train/config.py`, which `make docs` made this page from).",
        "",
        "| key | default | what it is |",
        "|---|---|---|",
    ]

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner: Any = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                walk(inner, f"{prefix}{name}.")
                continue
            default = "required" if field.is_required() else f"`{field.default}`"
            lines.append(f"| `{prefix}{name}` | {default} | {field.description} |")

    walk(Recipe, "")
    return "\n".join(lines) + "\n"


def cli() -> str:
    """The help of every command."""
    parts = ["# Command line\n\nMade by `make docs` from the commands' own help.\n"]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    for command in ("", *COMMANDS):
        words = [sys.executable, "-m", "grace_vlm.cli.main", *command.split(), "--help"]
        text = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout
        body = "\n".join(line.rstrip() for line in text.strip().splitlines()).replace(
            "python -m grace_vlm.cli.main", "grace"
        )
        parts.append(f"## grace {command}\n\n```\n{body}\n```\n".replace("## grace \n", "## grace\n"))
    return "\n".join(parts)


def main() -> None:
    """Write both."""
    (HERE / "recipes.md").write_text(recipes(), encoding="utf-8")
    (HERE / "cli.md").write_text(cli(), encoding="utf-8")


if __name__ == "__main__":
    main()
