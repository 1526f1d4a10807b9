"""Damaged model folders: an error in one line, or a model that its certificate knows; never anything else.

A case is its number, which a failure names. ``GRACE_CASE=N pytest -m soak tests/formats/test_mutations.py`` repeats
case N alone; ``GRACE_CASES`` is how many the long run takes, 100,000 if it is not said.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_sidecars import ForkedSidecars
from mutation_bases import read_bases, write_bases
from mutations import Odd, case

from grace_vlm.formats.registry import converters

RUN = Path(__file__).with_name("mutation_run.py")
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def root(forked_sidecars: ForkedSidecars) -> Iterator[Path]:
    """Base folders, and copies of them that nothing may open; in memory where there is such a disk."""
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="grace-mutations-", dir=place) as name:
        write_bases(Path(name) / "bases")
        shutil.copytree(Path(name) / "bases", Path(name) / "canary")
        yield Path(name)


def run(
    root: Path, stop: int, processes: int, begin: int = 0, command: tuple[str, ...] = (str(RUN),)
) -> dict[str, int]:
    """Cases from ``begin`` up to ``stop`` in a few processes; what was counted."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    parts = [
        subprocess.Popen(
            [sys.executable, *command, str(root), str(first), str(stop), str(processes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for first in range(begin, begin + processes)
    ]
    found: dict[str, int] = {}
    for first, part in enumerate(parts, start=begin):
        text, _ = part.communicate()
        assert part.returncode == 0, f"died with {part.returncode} at case {(root / f'at-{first}').read_text()}"
        told: dict[str, Any] = json.loads(text)
        failures = [f"case {number} ({what}): {wrong}" for number, what, wrong in told["failures"]]
        assert not failures, "\n".join(failures)
        found = {name: found.get(name, 0) + count for name, count in told["counts"].items()}
    return found


def check_counts(counts: dict[str, int], cases: int) -> None:
    """The damage is neither all fatal nor all without effect: each way out of a case was taken often."""
    assert counts["cases"] == cases
    assert 0.3 * cases < counts["read"] < 0.6 * cases
    assert counts["read, and another model"] > 0.05 * cases
    assert counts["packed"] > 0.01 * cases


def test_every_layout_is_damaged(root: Path) -> None:
    bases = read_bases(root / "bases")
    assert {name.rpartition("-")[0] for name in bases} >= set(converters())
    damaged = {case(number, bases).base.split("-")[0] for number in range(2000)}
    assert damaged == {name.split("-")[0] for name in bases}


def test_a_number_is_a_case(root: Path) -> None:
    bases = read_bases(root / "bases")
    assert [case(number, bases) for number in range(200)] == [case(number, bases) for number in range(200)]
    assert len({case(number, bases).description for number in range(200)}) > 190


def test_2_000_damaged_folders(root: Path) -> None:
    check_counts(run(root, 2000, 2), 2000)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_100_000_damaged_folders(root: Path) -> None:
    if alone := os.environ.get("GRACE_CASE"):
        run(root, int(alone) + 1, 1, int(alone))
        return
    count = int(os.environ.get("GRACE_CASES", 100_000))
    check_counts(run(root, count, 2), count)


DEFECTS = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import mutation_run
from grace_vlm.formats import verify, weights
weights.inside = lambda path, model=None: True
verify.differing = lambda stated, found: []
mutation_run.main(Path(sys.argv[1]), {first}, {second} + 1, {second} - {first})
"""


def test_the_run_sees_defects(root: Path) -> None:
    """Links that are followed out of the folder, and a certificate that is always right: a case for each."""
    bases = read_bases(root / "bases")
    cases = [case(number, bases) for number in range(10_000)]
    link = next(one.number for one in cases if one.changes.get("config.json") == Odd("link", "{canary}/config.json"))
    codes = next(
        one.number
        for one in cases
        if one.base == "awq-w4" and "random value" in one.description and one.description.endswith(".qweight")
    )
    first, second = sorted((link, codes))
    code = DEFECTS.format(folder=str(RUN.parent), first=first, second=second)
    with pytest.raises(AssertionError) as caught:
        run(root, 0, 1, command=("-c", code))
    said = str(caught.value)
    assert re.search(rf"case {link} \(.*: config.json is link to a copy\): opened .*/canary/.*/config.json", said)
    assert re.search(rf"case {codes} \(.*\): read_model does not give the base; the certificate names \[\]", said)
