"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For properties of thousands of saves, where durability is not the question."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
