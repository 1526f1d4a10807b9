"""The architectures there are: those of this room, and installed plug-ins (docs/extending.md).

A plug-in is any installed distribution with an entry point in the group ``grace_vlm.adapters``; its name is the
``model_type`` and its value the adapter class. It comes before ours, so that one of ours can be replaced.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import Adapter
from grace_vlm.models.llava import LlavaAdapter
from grace_vlm.models.qwen2_vl import Qwen2VLAdapter, Qwen25VLAdapter
from grace_vlm.models.qwen3_vl import Qwen3VLAdapter

PLUGIN_GROUP = "grace_vlm.adapters"


def adapter_for(model_type: str) -> Adapter:
    """The adapter of ``config.model_type``; ``ConfigError`` names what is supported."""
    for plugin in entry_points(group=PLUGIN_GROUP, name=model_type):
        adapter: Adapter = plugin.load()()
        return adapter
    ours: list[Adapter] = [Qwen3VLAdapter(), Qwen2VLAdapter(), Qwen25VLAdapter(), LlavaAdapter()]
    adapters = {adapter.model_type: adapter for adapter in ours}
    if model_type in adapters:
        return adapters[model_type]
    supported = ", ".join(sorted({*adapters, *(plugin.name for plugin in entry_points(group=PLUGIN_GROUP))}))
    if "moe" in model_type:
        raise ConfigError(
            f"model type {model_type!r} is a mixture of experts, which is not supported: its experts are no linear "
            f"layers that a grid applies to; use a dense model ({supported})"
        )
    raise ConfigError(
        f"model type {model_type!r} has no adapter; supported: {supported} (docs/extending.md: a new one is one file)"
    )
