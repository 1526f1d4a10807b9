"""One suite for all tests of this folder, and readers of its files that share no code with the writers."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_vlm.evals.toy.suite import write_toy_suite


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "suite"
    folders = write_toy_suite(folder, seed=0)
    assert folders == {
        name: folder / name for name in ("hallusion", "mmbench", "scienceqa", "ai2d", "mmmu", "seed", "mmstar")
    }
    return folder
