"""Rows and models that the launched runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_run import write_models, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_rows(folder, 48)
    write_models(folder)
    return folder
