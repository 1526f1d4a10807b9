"""``grace quantize``: a model folder in, a model folder with a grid out; no training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from grace_vlm.errors import ConfigError
from grace_vlm.formats.publish import publish_model
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.load import load_model
from grace_vlm.ptq.calibration import calibration_entries, calibration_forwards, layer_names
from grace_vlm.ptq.layers import Progress, quantize_layers
from grace_vlm.ptq.rtn import round_to_nearest
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.quant.scale_init import ScaleRule

PtqMethod = Literal["rtn", "awq", "gptq"]


def quantize_folder(
    src: str,
    dst: Path,
    scheme: str,
    *,
    method: PtqMethod = "rtn",
    scale: ScaleRule = "mse",
    calibration: Path | None = None,
    images: Path | None = None,
    num_rows: int = 128,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> QuantPlan:
    """Quantize ``src`` into ``dst``; returns the plan.

    Args:
        calibration: file of rows for awq and gptq, with ``images`` the root of their pictures; ``num_rows`` of them
            are drawn by ``seed``.
        device: where awq and gptq compute; rtn stays on the CPU.

    Raises:
        ConfigError: ``scheme`` is bf16, does not fit a layer, ``src`` is no model, or rows and method do not agree.
        DataError: rows that cannot be read, or none. NonFiniteError: NaN or Inf on the way.
        CheckpointError: ``dst`` exists without ``overwrite``.
    """
    if scheme == "bf16":
        raise ConfigError("quantize needs a grid, scheme is bf16; use for example --scheme w4g128")
    if method == "rtn":
        if calibration is not None:
            raise ConfigError("method rtn takes no --calibration; leave it out")
        loaded = load_model(src, "cpu")
        plan = plan_model(loaded.model, loaded.adapter, scheme)
        quantized = round_to_nearest(loaded.model, plan, scale)
        how = f"Rounded to nearest ({scale} scales)"
    else:
        if calibration is None:
            raise ConfigError(f"method {method} needs rows to calibrate on; give --calibration FILE")
        loaded = load_model(src, device)
        plan = plan_model(loaded.model, loaded.adapter, scheme)
        entries = calibration_entries(loaded, calibration, images, num_rows, seed)
        forwards = calibration_forwards(loaded, entries)
        quantized = quantize_layers(loaded.model, plan.schemes, layer_names(loaded), forwards, method, scale, progress)
        how = f"Quantized by {method} ({scale} scales, {len(entries)} rows of `{calibration.name}`, seed {seed})"
    card = f"# {method} {scheme}\n\n{how} from `{src}` by grace-vlm. No training.\n"
    publish_model(dst, loaded.model, loaded.processor, quantized, plan.bf16_names, card, overwrite=overwrite)
    return plan
