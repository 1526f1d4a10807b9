"""Learned step size: what the gradient of a grid weight says about the weight and about its scale.

theta = log |s| is trained, one per group; the sign of s stays as it began. With v = w / s, q = clamp(round(v)),
w^ = q s and G = dL/dw^, the straight-through estimator of the rounding (not of the clamp) gives

    dL/dw     = G m                       m = 1 inside the grid, 0 outside
    dL/ds     = sum_group G (q - v m)     (inside: q - v, outside: the clamped code itself)
    dL/dtheta = s dL/ds                   (the rounding of s to its stored value is passed straight through)

Both are linear in G. So the grid weights can be made **once per optimizer step**, G accumulated over micro-batches,
and this backward taken once: the same gradients as a fake-quantizer in every forward, without its traffic
(44 bytes a weight forward, 106 backward, in eager FP32).

``clip_mask`` says what "inside" is: ``official`` tests round(v) (v in [-8.5, 7.5] at 4 bits), as the reference code
does; ``lsq`` tests v itself (Esser et al. 2020); ``pass_through`` lets every weight's gradient through and keeps
the official rule for the scale. ``scale_gradient="lsq"`` multiplies dL/dtheta by 1 / sqrt(group_size qmax); Adam is
blind to it but for its epsilon and the global clip norm.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from grace_vlm.quant.affine import compute_dtype, fake_quantize, round_scale, to_groups
from grace_vlm.quant.scheme import QuantScheme

ClipMask = Literal["official", "lsq", "pass_through"]
ScaleGradient = Literal["none", "lsq"]


def lsq_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    log_scale: torch.Tensor,
    scheme: QuantScheme,
    clip_mask: ClipMask = "official",
    scale_gradient: ScaleGradient = "none",
    sign: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dL/dw, dL/dlog_scale) from G = dL/dw^.

    Args:
        grad: (out, in), accumulated over the micro-batches of the step.
        weight: (out, in) master weight of the same step.
        log_scale: (out, in / group_size). sign: +1 and -1 of the scales, as long; None: all are positive.

    Returns:
        (out, in) and (out, in / group_size), FP32 (FP64 if the weight is).
    """
    dtype = compute_dtype(weight)
    raw_scale = scale_of(log_scale.to(dtype), sign)
    scale = round_scale(raw_scale, scheme.scale_rounding).unsqueeze(-1)
    ratio = to_groups(weight.to(dtype), scheme.group_size) / scale
    grad_groups = to_groups(grad.to(dtype), scheme.group_size)
    rounded = ratio.round()
    codes = rounded.clamp(scheme.qmin, scheme.qmax)
    tested = ratio if clip_mask == "lsq" else rounded
    inside = (tested >= scheme.qmin) & (tested <= scheme.qmax)
    grad_scale = (grad_groups * (codes - torch.where(inside, ratio, 0.0))).sum(dim=-1)
    # A copy, never a view: the caller's accumulator starts again at 0.
    grad_weight = grad_groups.clone() if clip_mask == "pass_through" else torch.where(inside, grad_groups, 0.0)
    grad_log_scale = grad_scale * raw_scale
    if scale_gradient == "lsq":
        grad_log_scale = grad_log_scale / (scheme.group_size * scheme.qmax) ** 0.5
    return grad_weight.reshape(weight.shape), grad_log_scale


def scale_of(log_scale: torch.Tensor, sign: torch.Tensor | None) -> torch.Tensor:
    """sign * exp(log_scale), before it is rounded."""
    return log_scale.exp() if sign is None else log_scale.exp() * sign


class LsqFakeQuantize(torch.autograd.Function):
    """w^ with its gradients, as one differentiable operation: the per-forward form.

    Training does not use it (see above); it is the reference that the once-per-step form is tested against.
    ``LsqFakeQuantize.apply(weight, log_scale, scheme, clip_mask, scale_gradient, sign)`` -> (out, in), weight's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        log_scale: torch.Tensor,
        scheme: QuantScheme,
        clip_mask: ClipMask,
        scale_gradient: ScaleGradient,
        sign: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, log_scale)
        ctx.options = (scheme, clip_mask, scale_gradient, sign)
        return fake_quantize(weight, round_scale(scale_of(log_scale, sign), scheme.scale_rounding), scheme)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, log_scale = ctx.saved_tensors
        grad_weight, grad_log_scale = lsq_backward(grads[0], weight, log_scale, *ctx.options)
        return grad_weight.to(weight.dtype), grad_log_scale.to(log_scale.dtype), None, None, None, None
