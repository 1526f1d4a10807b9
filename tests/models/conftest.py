"""One toy world for the model tests: saved, and opened again by Transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_world import TEXTS, World

from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "student"
    processor = build_toy_processor(TEXTS * 4, vocab_size=384)
    model = build_toy_model("student", processor, seed=3)
    # A random tied head says nothing of small differences; louder embeddings do.
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.mul_(20)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(toy_folder: Path) -> World:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(toy_folder)
    model = AutoModelForImageTextToText.from_pretrained(toy_folder, dtype=torch.float32).eval()
    return World(processor, model, adapter_for(model.config.model_type))
