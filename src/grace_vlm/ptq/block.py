"""Block reconstruction: each decoder layer on the grid learns to give what it gave before.

Li et al. 2021 (BRECQ), as Chen et al. 2024 have it (EfficientQAT, Block-AP): for layer f with weights W, scales s and
the states x that the quantized layers before it make, W and s of all its linears are trained together,

    min  mean |f(x; fake_quantize(W, s)) - f(x; W_0)|^2        Adam, batch by batch, gradients of quant/lsq.py

from W_0 and the rule's scale. Norms stay. What is kept is the best of all passes over the batches, the start among
them, so no layer is worse than rounded.

Memory: what the layer gave, (tokens, d) of all batches, beside the replay's states; of one layer two copies of
its weights, their gradients and moments, and the activations of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from grace_vlm.errors import NonFiniteError
from grace_vlm.ptq.replay import Replay
from grace_vlm.quant.affine import bake, compute_dtype, quantize_tensor
from grace_vlm.quant.lsq import LsqFakeQuantize, scale_of
from grace_vlm.quant.scale_init import ScaleRule, init_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

NUM_PASSES = 10
"""Over the calibration batches, a layer."""
WEIGHT_RATE, SCALE_RATE = 0.005, 0.02
"""In steps of the grid: how far Adam moves a weight at once at the start, and the end of the grid by moving its scale;
both fall to 0 in a straight line. What is right at four bits is then right at eight, whose steps are a sixteenth."""


def reconstruct_layer(
    replay: Replay,
    number: int,
    schemes: Mapping[str, QuantScheme],
    rule: ScaleRule,
    before: dict[str, torch.Tensor],
    num_passes: int = NUM_PASSES,
) -> dict[str, QuantizedTensor]:
    """(codes, stored scale) of the linears ``schemes`` of layer ``number``, whose weights become the baked ones.

    Args:
        before: filled with the trained weights that were rounded.

    Raises:
        NonFiniteError: NaN or Inf in what the rounded layer gives.
    """
    if not schemes:
        return {}
    layer, batches = replay.layers[number], range(len(replay.forwards))
    linears = {name: layer.get_submodule(name) for name in schemes}
    grid = {}
    for name, scheme in schemes.items():
        weight = linears[name].weight.detach()
        weight = weight.to(compute_dtype(weight), copy=True)
        grid[name] = _Trained(weight, init_scale(weight, scheme, rule), scheme)
    targets = [replay.run(number, batch)[1] for batch in batches]
    optimizer = torch.optim.Adam([group for one in grid.values() for group in one.groups()])
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, num_passes * len(batches)))
    best, least = dict[str, QuantizedTensor](), float("inf")
    with _computing_on(linears, grid):
        for done in range(num_passes + 1):
            error = sum(float(F.mse_loss(replay.run(number, batch)[1], targets[batch])) for batch in batches)
            if not error < float("inf"):
                if not best:
                    raise NonFiniteError(f"{replay.names[number]} gives NaN or Inf; look at the model and its rows")
                break  # it ran away: what was best before stays
            if error < least:
                best, least = {name: one.on_grid() for name, one in grid.items()}, error
                before.update((name, one.weight.detach().clone()) for name, one in grid.items())
            for batch in batches if done < num_passes else ():
                _learn(replay, number, batch, targets[batch], optimizer)
                decay.step()
    with torch.no_grad():
        for name, tensor in best.items():
            linears[name].weight.copy_(bake(tensor))
    return best


class _Trained:
    """A linear's weight (out, in) and log-scale (out, groups), which learn; scales keep the sign of their start."""

    def __init__(self, weight: torch.Tensor, start: torch.Tensor, scheme: QuantScheme) -> None:
        self.weight, self.scheme, self.sign = weight.requires_grad_(), scheme, start.sign()
        self.log_scale = start.abs().log().requires_grad_()

    def groups(self) -> list[dict[str, Any]]:
        """What an optimizer trains, and how fast."""
        step = float(self.log_scale.detach().exp().mean())
        return [
            {"params": [self.weight], "lr": WEIGHT_RATE * step},
            {"params": [self.log_scale], "lr": SCALE_RATE / self.scheme.qmax},
        ]

    def value(self) -> Any:
        """The weight on its grid, with gradients for both."""
        return LsqFakeQuantize.apply(self.weight, self.log_scale, self.scheme, "official", "none", self.sign)

    @torch.no_grad()
    def on_grid(self) -> QuantizedTensor:
        return quantize_tensor(self.weight, scale_of(self.log_scale, self.sign), self.scheme)


def _learn(replay: Replay, number: int, batch: int, target: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step on one batch."""
    trained = [x for group in optimizer.param_groups for x in group["params"]]
    with torch.enable_grad():
        error = F.mse_loss(replay.run(number, batch, with_grad=True)[1], target)
        gradients = torch.autograd.grad(error, trained)
    for x, gradient in zip(trained, gradients, strict=True):
        x.grad = gradient
    optimizer.step()


@contextmanager
def _computing_on(linears: Mapping[str, Any], grid: Mapping[str, _Trained]) -> Iterator[None]:
    """``linears`` compute with their weights on the grid."""
    for name, linear in linears.items():

        def forward(x: torch.Tensor, linear: Any = linear, one: _Trained = grid[name]) -> torch.Tensor:
            return F.linear(x, one.value().to(x.dtype), linear.bias)

        linear.forward = forward
    try:
        yield
    finally:
        for linear in linears.values():
            del linear.forward
