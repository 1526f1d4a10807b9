"""What the environments of several tests have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from environments import Base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    made = Base(tmp_path_factory.mktemp("base"))
    yield made
    made.remove()
