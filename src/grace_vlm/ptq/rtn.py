"""Round to nearest: the baseline without data. Scales by min-max or by the MSE grid search, then one rounding."""

from __future__ import annotations

from typing import Any

import torch

from grace_vlm.ptq.layers import Progress
from grace_vlm.quant.affine import bake, quantize_tensor
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.quant.scale_init import ScaleRule, init_scale
from grace_vlm.quant.scheme import QuantizedTensor


@torch.no_grad()
def round_to_nearest(
    model: Any, plan: QuantPlan, rule: ScaleRule, progress: Progress = lambda done, total: None
) -> dict[str, QuantizedTensor]:
    """(codes, scale) of every planned linear; the model's weights become the baked ones, in place."""
    quantized: dict[str, QuantizedTensor] = {}
    for name, scheme in plan.schemes.items():
        weight = model.get_submodule(name).weight
        quantized[name] = quantize_tensor(weight.float(), init_scale(weight.float(), scheme, rule), scheme)
        weight.copy_(bake(quantized[name]))
        progress(len(quantized), len(plan.schemes))
    return quantized
