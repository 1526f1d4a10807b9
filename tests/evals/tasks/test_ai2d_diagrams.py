"""AI2D's diagrams are hashed when the rows are read, and never again, however many profiles score them."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_vlm.evals.tasks import ai2d
from grace_vlm.evals.tasks.task import record_of


def test_a_picture_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "question": f"q{n}",
            "options": ["a", "b"],
            "answer": "0",
            "image": {"bytes": b"picture %d" % (n // 2), "path": None},
        }
        for n in range(6)
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "test-0.parquet")
    hashed: list[bytes] = []

    def counted(data: bytes) -> object:
        hashed.append(data)
        return sha256(data)

    sha256 = ai2d.hashlib.sha256
    monkeypatch.setattr(ai2d.hashlib, "sha256", counted)
    docs = ai2d.MASKED.docs(tmp_path)
    records = [record_of(ai2d.MASKED, doc, "A", profile) for profile in ("card", "kit", "strict") for doc in docs]
    assert len(hashed) == len(rows)
    assert len({record.groups["diagram"] for record in records}) == 3, "two questions a diagram"
