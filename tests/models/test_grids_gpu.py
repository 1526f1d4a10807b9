"""Pictures of many sizes in one call of the tower, on a GPU in BF16 (make gpu-test)."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "grids",
    [
        [(1, 8, 8)] * 3,
        [(1, 8, 8), (1, 4, 12), (1, 16, 6), (1, 4, 12), (1, 2, 2)],
        # Above 128 patches torch 2.14 takes another kernel.
        [(1, 28, 28), (1, 20, 28), (1, 8, 8)],
    ],
)
def test_together_and_one_by_one_are_the_same(grids: list[tuple[int, int, int]]) -> None:
    processor = build_toy_processor(["red green blue"] * 3, vocab_size=320)
    model = build_toy_model("tiny", processor, 0).to("cuda", torch.bfloat16).eval()
    adapter, visual = adapter_for(model.config.model_type), model.model.visual
    width = visual.patch_embed.proj.weight[0].numel()
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(t * h * w, width, generator=generator) for t, h, w in grids]
    with torch.no_grad():
        together = adapter.tower(model, pixels, grids)
        alone = [adapter.tower(model, [one], [grid])[0] for one, grid in zip(pixels, grids, strict=True)]
    for found, expected in zip(together, alone, strict=True):
        for a, b in zip((found.hidden, *found.deepstack), (expected.hidden, *expected.deepstack), strict=True):
            assert a.shape == b.shape
            assert float((a.float() - b.float()).norm() / b.float().norm()) < 0.02
