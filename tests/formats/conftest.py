"""Tiny model folders, made once a session; tests copy what they damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_sidecars import ForkedSidecars
from tiny_models import build_tiny, write_model_folder

from grace_vlm.formats import sidecar
from grace_vlm.formats.pack import pack
from grace_vlm.quant import QuantizedTensor


@pytest.fixture(autouse=True, scope="session")
def forked_sidecars() -> Iterator[ForkedSidecars]:
    """The process that opens a pickle is forked, not started: the same code under the same limits, without imports."""
    server = ForkedSidecars(sidecar._run_child)
    sidecar._run_child = server.run
    yield server
    sidecar._run_child = server.started
    server.close()


@pytest.fixture
def started_sidecars(forked_sidecars: ForkedSidecars, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that opens a pickle is started anew, as users have it."""
    monkeypatch.setattr(sidecar, "_run_child", forked_sidecars.started)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, forked_sidecars: ForkedSidecars) -> Path:
    """A folder with w4, w8, mixed, sig5, fp32 and bf16 model folders, and w4, w8, mixed packed two ways."""
    root = tmp_path_factory.mktemp("models")
    model, processor = build_tiny()
    write_model_folder(root / "w4", model, processor, lambda name: "w4g128")
    write_model_folder(root / "w8", model, processor, lambda name: "w8g64")
    write_model_folder(root / "w3", model, processor, lambda name: "w3g128")
    write_model_folder(root / "sig5", model, processor, lambda name: "w4g32", "sig5")
    write_model_folder(root / "fp32", model, processor, lambda name: "w4g128", "fp32")
    write_model_folder(root / "bf16", model, processor, lambda name: "bf16")

    def mixed(name: str) -> str:
        if name.endswith("layers.1.mlp.down_proj"):
            return "bf16"
        return "w8g128" if "layers.0" in name else "w4g64"

    write_model_folder(root / "mixed", model, processor, mixed)
    for name in ("w4", "w8", "sig5", "mixed"):
        pack(root / name, root / f"{name}-ct", "compressed-tensors")
    for name in ("w4", "w8", "w3", "sig5"):
        pack(root / name, root / f"{name}-official", "official")
    return root


@pytest.fixture(scope="session")
def processor(models: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(models / "w4")


@pytest.fixture(scope="session")
def on_grid(models: Path) -> dict[str, dict[str, QuantizedTensor]]:
    """What is on the grid of each model folder, made again without reading anything back."""
    from tiny_models import quantize_linears

    model, _ = build_tiny()
    return {
        "w4": quantize_linears(model, lambda name: "w4g128")[0],
        "w8": quantize_linears(model, lambda name: "w8g64")[0],
    }
