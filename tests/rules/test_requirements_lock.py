"""requirements.lock installs today what it installed when it was made."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).parents[2] / "requirements.lock"


def pinned() -> dict[str, set[str]]:
    """Distribution -> extras that the lock pins with it."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[([^]]*)\])?==", LOCK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {canonicalize_name(name): {e.strip() for e in extras.split(",")} - {""} for name, extras in found}


def test_an_extra_that_is_required_is_pinned() -> None:
    """pip takes ``coverage[toml]`` for another requirement than ``coverage==7.17.3`` and refuses a newer one's hash."""
    lock, wrong = pinned(), []
    assert len(lock) > 50
    for name, extras in lock.items():
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        for text in requires:
            requirement = Requirement(text)
            wanted = canonicalize_name(requirement.name)
            environments = [{"extra": extra} for extra in ("", *extras)]
            active = requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments)
            if active and not requirement.extras <= lock.get(wanted, set()):
                wrong.append(f"{name} needs {text}; the lock has {wanted} with {sorted(lock.get(wanted, set()))}")
    assert not wrong, wrong
