"""Numbers on a grid: schemes, the reference arithmetic, scale search, learned step size, layouts, the plan.

Pure torch: no files, no models, no training loop.
"""

from grace_vlm.quant.affine import bake, dequantize, fake_quantize, quantize, quantize_tensor, round_scale
from grace_vlm.quant.lsq import lsq_backward
from grace_vlm.quant.plan import QuantPlan, make_plan
from grace_vlm.quant.scale_init import init_scale, minmax_scale, mse_scale, signed_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme, parse_scheme

__all__ = [
    "QuantPlan",
    "QuantScheme",
    "QuantizedTensor",
    "bake",
    "dequantize",
    "fake_quantize",
    "init_scale",
    "lsq_backward",
    "make_plan",
    "minmax_scale",
    "mse_scale",
    "parse_scheme",
    "quantize",
    "quantize_tensor",
    "round_scale",
    "signed_scale",
]
