"""FP32 masters behind BF16-valued leaves, and the grid between them.

The model's parameters ("leaves") hold what the forward uses: bf16(q s) of a quantized linear, bf16(w) of everything
else that is trained. They are written **once per optimizer step**, from the masters; micro-batches share them. So

    materialize:  leaf <- grid value of (master, log_scale), or bf16(master)
    backward:     G = sum over micro-batches of dL/dleaf, in FP32
    collect:      (dL/dmaster, dL/dlog_scale) <- one straight-through backward of G (quant/lsq.py)

Why an FP32 accumulator: a BF16 sum over 16 micro-batches loses a term that is 2^-8 of the sum, and the published
accumulation is 16. Each leaf's gradient is added as soon as autograd has it and freed, so no BF16 copy stays. The
accumulator is then the master's gradient itself: a copy would be 7 GB for Qwen3-VL-2B.
FP64 models (tests) accumulate in FP64. On a CPU leaves are FP32 tensors that hold BF16 values.

A frozen weight with a grid (the vision tower under ``quant.tower``) is rounded to nearest once, at the start: it is
what is stored, and the student learns around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grace_vlm.quant.affine import bake, compute_dtype, fake_quantize, quantize, quantize_tensor, round_scale
from grace_vlm.quant.lsq import ClipMask, ScaleGradient, lsq_backward
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.quant.scale_init import ScaleRule, init_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme


@dataclass
class _Tracked:
    """One trained parameter: its leaf, its master, its accumulated gradient, and its grid if it has one."""

    leaf: nn.Parameter
    master: nn.Parameter
    accumulated: torch.Tensor
    scheme: QuantScheme | None = None
    log_scale: nn.Parameter | None = None
    scale: torch.Tensor | None = None
    """The scale that the leaf was written with."""


class Masters:
    """Masters of every trained parameter of a model.

    Args:
        model: its parameters with ``requires_grad`` are trained; their values are the masters' start.
        plan: which linears have a grid.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: QuantPlan,
        *,
        scale_init: ScaleRule = "mse",
        clip_mask: ClipMask = "official",
        scale_gradient: ScaleGradient = "none",
    ) -> None:
        self.clip_mask, self.scale_gradient = clip_mask, scale_gradient
        self._tracked: dict[str, _Tracked] = {}
        self._rounded: dict[str, QuantizedTensor] = {}
        schemes = {f"{name}.weight": scheme for name, scheme in plan.schemes.items()}
        for name, leaf in model.named_parameters():
            if not leaf.requires_grad:
                if name in schemes:
                    self._round(name.removesuffix(".weight"), leaf, schemes[name], scale_init)
                continue
            master = nn.Parameter(leaf.detach().to(compute_dtype(leaf), copy=True))
            tracked = _Tracked(leaf, master, torch.zeros_like(master), schemes.get(name))
            if tracked.scheme is not None:
                start = init_scale(master.detach(), tracked.scheme, scale_init)
                tracked.log_scale = nn.Parameter(start.to(torch.float64).log().to(master.dtype))
            self._tracked[name] = tracked
            leaf.register_post_accumulate_grad_hook(self._add_to(tracked.accumulated))
        self._initial_log_scales = {name: scale.detach().clone() for name, scale in self.log_scales()}
        self.materialize()

    @torch.no_grad()
    def _round(self, name: str, leaf: nn.Parameter, scheme: QuantScheme, scale_init: ScaleRule) -> None:
        weight = leaf.to(compute_dtype(leaf))
        self._rounded[name] = quantize_tensor(weight, init_scale(weight, scheme, scale_init), scheme)
        leaf.copy_(bake(self._rounded[name]))

    @staticmethod
    def _add_to(accumulated: torch.Tensor) -> Any:
        # It must not hold the leaf: a tensor whose hook holds it is never freed, and the model with it.
        def hook(leaf: torch.Tensor) -> None:
            assert leaf.grad is not None
            accumulated.add_(leaf.grad)
            leaf.grad = None

        return hook

    def masters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, tracked.master) for name, tracked in self._tracked.items())

    def log_scales(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tracked in self._tracked.items():
            if tracked.log_scale is not None:
                yield name, tracked.log_scale

    def _scale(self, tracked: _Tracked) -> torch.Tensor:
        assert tracked.scheme is not None
        assert tracked.log_scale is not None
        return round_scale(tracked.log_scale.detach().exp(), tracked.scheme.scale_rounding)

    @torch.no_grad()
    def materialize(self, count_flips: bool = False) -> int:
        """Write every leaf from its master; accumulators start again at 0.

        Returns:
            how many codes changed since the last call, if they are counted (a host read), else 0. The old codes are
            read off the leaf, which holds bf16(q s): keeping them would cost a byte a weight.
        """
        flipped: list[torch.Tensor] = []
        for tracked in self._tracked.values():
            tracked.accumulated.zero_()
            tracked.master.grad = None
            if tracked.scheme is None:
                # FP64 models (tests) keep the master's value: they check gradients, not rounding.
                exact = tracked.master.dtype == torch.float64
                tracked.leaf.copy_(tracked.master if exact else tracked.master.to(torch.bfloat16))
                continue
            scale = self._scale(tracked)
            if count_flips:
                assert tracked.scale is not None
                old = quantize(tracked.leaf.to(tracked.master.dtype), tracked.scale, tracked.scheme)
                flipped.append((old != quantize(tracked.master, scale, tracked.scheme)).sum())
            tracked.leaf.copy_(fake_quantize(tracked.master, scale, tracked.scheme))
            tracked.scale = scale
        return int(torch.stack(flipped).sum()) if flipped else 0

    @torch.no_grad()
    def collect(self) -> None:
        """Turn the accumulated gradients into ``.grad`` of masters and log-scales, until ``materialize``."""
        for tracked in self._tracked.values():
            if tracked.scheme is not None:
                assert tracked.log_scale is not None
                grad, tracked.log_scale.grad = lsq_backward(
                    tracked.accumulated,
                    tracked.master,
                    tracked.log_scale,
                    tracked.scheme,
                    self.clip_mask,
                    self.scale_gradient,
                )
                tracked.accumulated.copy_(grad)
            tracked.master.grad = tracked.accumulated

    def accumulator(self, leaf: torch.Tensor) -> torch.Tensor | None:
        """The FP32 gradient sum of a leaf, to add to without autograd; None if the leaf is not trained."""
        return next((tracked.accumulated for tracked in self._tracked.values() if tracked.leaf is leaf), None)

    def accumulators(self) -> list[torch.Tensor]:
        """The gradient sums, for the reduction over ranks (before ``collect``)."""
        return [tracked.accumulated for tracked in self._tracked.values()]

    @property
    def num_codes(self) -> int:
        """Trained weights on a grid."""
        return sum(tracked.master.numel() for tracked in self._tracked.values() if tracked.scheme is not None)

    @torch.no_grad()
    def scale_drift(self) -> float:
        """Mean |log s - log s_0| over all groups: how far the scales have moved since the start; 0 without a grid."""
        drifts = [(s - self._initial_log_scales[name]).abs().flatten() for name, s in self.log_scales()]
        return float(torch.cat(drifts).mean()) if drifts else 0.0

    @torch.no_grad()
    def quantized(self) -> dict[str, QuantizedTensor]:
        """(codes, scale) by module name: what is saved. Computed with the scale that is stored."""
        trained = {
            name.removesuffix(".weight"): quantize_tensor(tracked.master, self._scale(tracked), tracked.scheme)
            for name, tracked in self._tracked.items()
            if tracked.scheme is not None
        }
        return {**self._rounded, **trained}

    @torch.no_grad()
    def load_state_dict(self, masters: dict[str, torch.Tensor], log_scales: dict[str, torch.Tensor]) -> None:
        """Restore what ``masters()`` and ``log_scales()`` gave, and write the leaves.

        The start of the scale drift is not state: it follows from the student, which a resumed run opens again.
        """
        for name, master in self.masters():
            master.copy_(masters[name])
        for name, log_scale in self.log_scales():
            log_scale.copy_(log_scales[name])
        self.materialize()
