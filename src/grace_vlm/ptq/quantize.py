"""``grace quantize``: a model folder in, a model folder with a grid out; no training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from grace_vlm.errors import ConfigError
from grace_vlm.formats.publish import publish_model
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.load import load_model
from grace_vlm.ptq.rtn import round_to_nearest
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.quant.scale_init import ScaleRule

PtqMethod = Literal["rtn"]


def quantize_folder(
    src: str,
    dst: Path,
    scheme: str,
    *,
    method: PtqMethod = "rtn",
    scale: ScaleRule = "mse",
    overwrite: bool = False,
) -> QuantPlan:
    """Quantize ``src`` into ``dst``; returns the plan.

    Raises:
        ConfigError: ``scheme`` is bf16, does not fit a layer, or ``src`` is no model.
        CheckpointError: ``dst`` exists without ``overwrite``.
    """
    if scheme == "bf16":
        raise ConfigError("quantize needs a grid, scheme is bf16; use for example --scheme w4g128")
    loaded = load_model(src, "cpu")
    plan = plan_model(loaded.model, loaded.adapter, scheme)
    quantized = round_to_nearest(loaded.model, plan, scale)
    card = f"# {method} {scheme}\n\nRounded to nearest ({scale} scales) from `{src}` by grace-vlm. No training.\n"
    publish_model(dst, loaded.model, loaded.processor, quantized, plan.bf16_names, card, overwrite=overwrite)
    return plan
