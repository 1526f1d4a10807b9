"""``grace quantize``: a model folder in, a model folder with a grid out; no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from grace_vlm.checkpoint.atomic import refuse_existing, refuse_overlap, sweep_partials
from grace_vlm.errors import ConfigError
from grace_vlm.formats.publish import publish_model
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.load import load_model
from grace_vlm.ptq.calibration import Calibration, calibration_entries, calibration_replay
from grace_vlm.ptq.layers import Progress, quantize_layers
from grace_vlm.ptq.rtn import round_to_nearest
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.quant.scale_init import ScaleRule

PtqMethod = Literal["rtn", "awq", "gptq", "block"]


def quantize_folder(
    src: str,
    dst: Path,
    scheme: str,
    *,
    method: PtqMethod = "rtn",
    scale: ScaleRule = "mse",
    calibration: Calibration | None = None,
    for_training: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> QuantPlan:
    """Quantize ``src`` into ``dst``; returns the plan.

    Args:
        for_training: write what awq or block would round, in BF16, with scales beside it in ``start/``: a student for
            ``quant.scale_init=stored``, whose weights are not yet on the grid.
        calibration: for awq, gptq and block, which compute in FP32 on its device; rtn has none and stays on the CPU.
        progress: of rtn linear by linear, of the others layer by layer.

    Raises:
        ConfigError: ``scheme`` is bf16, does not fit a layer, ``src`` is no model, or rows and method do not agree.
        DataError: rows that cannot be read. FormatError, NonFiniteError: NaN or Inf in weights or on the way.
        CheckpointError: ``dst`` exists without ``overwrite``.
    """
    if scheme == "bf16":
        raise ConfigError("quantize needs a grid, scheme is bf16; use for example --scheme w4g128")
    if for_training and method not in ("awq", "block"):
        raise ConfigError(
            f"--for-training is for awq and block, whose weights are others before they are rounded; after {method} "
            "train the student itself with quant.scale_init, or this folder with quant.scale_init=stored"
        )
    if Path(src).exists():
        refuse_overlap(Path(src), dst)
    sweep_partials(dst.absolute().parent, only=dst.name)
    refuse_existing(dst, overwrite)
    if method == "rtn":
        if calibration is not None:
            raise ConfigError("method rtn takes no --calibration; leave it out")
        loaded = load_model(src, "cpu")
        plan = plan_model(loaded.model, loaded.adapter, scheme)
        quantized = round_to_nearest(loaded.model, plan, scale, progress)
        how = f"Rounded to nearest ({scale} scales)"
    else:
        if calibration is None:
            raise ConfigError(f"method {method} needs rows to calibrate on; give --calibration FILE")
        loaded = load_model(src, calibration.device)
        plan = plan_model(loaded.model, loaded.adapter, scheme)
        loaded.model.float()
        entries = calibration_entries(loaded, calibration)
        replay = calibration_replay(loaded, entries)
        unrounded: dict[str, torch.Tensor] = {}
        quantized = quantize_layers(
            loaded.model, plan.schemes, replay, method, scale, progress, unrounded if for_training else None
        )
        with torch.no_grad():
            for name, weight in unrounded.items():
                loaded.model.get_submodule(name).weight.copy_(weight)
        rows = f"{len(entries)} rows of `{calibration.path.name}`, seed {calibration.seed}"
        by = "block reconstruction" if method == "block" else method.upper()
        how = f"Quantized by {by} ({scale} scales, {rows})"
    if for_training:
        card = (
            f"# A start for {scheme}\n\n{how} from `{src}` by grace-vlm, and not rounded: BF16 weights, and the scales "
            "in `start/`. Train it with `quant.scale_init=stored`.\n"
        )
        grids: dict[str, Any] = {"quantized": {}, "start": quantized}
    else:
        card = f"# {method} {scheme}\n\n{how} from `{src}` by grace-vlm. No training.\n"
        grids = {"quantized": quantized}
    publish_model(
        dst, loaded.model, loaded.processor, bf16_names=plan.bf16_names, card=card, overwrite=overwrite, **grids
    )
    return plan
