"""The architectures there are. A new one is one file and one entry here."""

from __future__ import annotations

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import Adapter
from grace_vlm.models.qwen3_vl import Qwen3VLAdapter


def adapter_for(model_type: str) -> Adapter:
    """The adapter of ``config.model_type``; ``ConfigError`` names what is supported."""
    adapters: dict[str, Adapter] = {"qwen3_vl": Qwen3VLAdapter()}
    if model_type not in adapters:
        raise ConfigError(f"model type {model_type!r} has no adapter; supported: {', '.join(adapters)}")
    return adapters[model_type]
