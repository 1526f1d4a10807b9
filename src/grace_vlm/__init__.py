"""GRACE: quantization-aware distillation of vision-language models, and what its user does next.

The names below are what a user types; they are imported on first use, so that importing the package costs nothing.

    >>> from grace_vlm import gated_decoupled_kd, relational_cka, QuantScheme, fake_quantize
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveWeight": "grace_vlm.losses",
    "LLM": "grace_vlm.engine.llm",
    "QuantScheme": "grace_vlm.quant",
    "QuantizedTensor": "grace_vlm.quant",
    "SamplingParams": "grace_vlm.engine.sampling",
    "dequantize": "grace_vlm.quant",
    "fake_quantize": "grace_vlm.quant",
    "gated_decoupled_kd": "grace_vlm.losses",
    "linear_gate": "grace_vlm.losses",
    "linear_gdkd": "grace_vlm.losses",
    "load_recipe": "grace_vlm.train.config",
    "minmax_scale": "grace_vlm.quant",
    "mse_scale": "grace_vlm.quant",
    "parse_scheme": "grace_vlm.quant",
    "quantize": "grace_vlm.quant",
    "relational_cka": "grace_vlm.losses",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grace_vlm' has no attribute {name!r}")
