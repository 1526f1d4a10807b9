"""Grid weights and their backward for the 1.4 B quantized weights of Qwen3-VL-2B (needs a GPU).

    python benchmarks/bench_fakequant.py            # -> benchmarks/results/fakequant.csv

Case ``optimizer_step_1p4b``, metric ``ms``: what fake-quantization costs besides the products of a step.

    ours             once per optimizer step: leaves from masters and scales, and the straight-through backward of the
                     summed gradient, 196 linears (train/masters.py: collect, materialize; kernels/fake_quantize.py)
    ours_torch       the same in eager torch (quant/affine.py, quant/lsq.py)
    official         once per micro-batch: v = w / s, round, clamp, q s, cast, and autograd's backward of it, eager in
                     FP32; with gradient checkpointing the forward runs twice, and it is counted once here
    floor            a device-to-device copy of as many bytes as ours must move: 18 a weight
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from official_step import fake_quantize
from record import gpu, place_of, results_file, row_of, time_interleaved, write_rows
from torch import nn

from grace_vlm.models.adapter import linear_shapes
from grace_vlm.quant.plan import make_plan
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantScheme
from grace_vlm.train.masters import Masters

LAYERS = 28
SHAPES = {"q": (2048, 2048), "k": (1024, 2048), "v": (1024, 2048), "o": (2048, 2048),
          "gate": (6144, 2048), "up": (6144, 2048), "down": (2048, 6144)}  # fmt: skip


def make_model(num_layers: int, device: torch.device) -> nn.Module:
    with torch.device(device):
        layers = [
            nn.ModuleDict({name: nn.Linear(i, o, bias=False, dtype=torch.bfloat16) for name, (o, i) in SHAPES.items()})
            for _ in range(num_layers)
        ]
    return nn.ModuleList(layers)


def ours(masters: Masters) -> None:
    for tracked in masters._tracked.values():
        tracked.gradient.is_empty = False  # as after the micro-batches' backward
    masters.collect()
    masters.materialize()


def ours_torch(masters: Masters) -> None:
    ((grids, _),) = masters._grids
    kept, grids._table = grids._table, None
    try:
        ours(masters)
    finally:
        grids._table = kept


def official(weights: list[torch.Tensor], log_scales: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """One micro-batch: forward and backward of every linear's fake-quantizer."""
    for weight, log_scale, gradient in zip(weights, log_scales, gradients, strict=True):
        fake_quantize(weight, log_scale, torch.clamp).backward(gradient)
        weight.grad = log_scale.grad = None


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path)
    made.add_argument("--iterations", type=int, default=20)
    args = made.parse_args()
    device = gpu()
    torch.manual_seed(0)
    model = make_model(LAYERS, device)
    masters = Masters(model, make_plan(linear_shapes(model), ".*", "w4g128"), scale_init="minmax")
    for tracked in masters._tracked.values():
        tracked.gradient.add(torch.randn_like(tracked.master) * 1e-3)
    scheme = QuantScheme(4, 128)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    log_scales = [minmax_scale(w.detach().float(), scheme).log().flatten().requires_grad_() for w in weights]
    gradients = [torch.randn_like(w) for w in weights]
    num_weights = sum(w.numel() for w in weights)
    half = torch.empty(9 * num_weights // 8, dtype=torch.uint8, device=device)
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(ours, masters),
        "ours_torch": partial(ours_torch, masters),
        "official": partial(official, weights, log_scales, gradients),
        # An eighth of the bytes at a time: 25 GB would not fit beside the rest.
        "floor": lambda: [half.clone() for _ in range(8)],
    }
    samples = time_interleaved(calls, device, args.iterations)
    place = place_of(device)
    rows = [
        row_of("fakequant", "optimizer_step_1p4b", name, "ms", values, "ms", place) for name, values in samples.items()
    ]
    for row in rows:
        print(f"{row['impl']} {row['p50']} ms ({num_weights:,} weights)", flush=True)
    write_rows(args.out or results_file("fakequant", device), rows)


if __name__ == "__main__":
    main()
