"""Kernels that start while the one before them runs, one after the other on the same memory: nobody reads too early."""

from __future__ import annotations

import pytest
import torch
from low_bit_cases import inputs_of, weight

from grace_vlm.kernels import starts_early
from grace_vlm.kernels.decoder_rows import Norm, gated, rms_norm
from grace_vlm.kernels.heads import Heads
from grace_vlm.kernels.low_bit_linear import low_bit_linear, pack_linear
from grace_vlm.kernels.next_token import advance
from grace_vlm.kernels.paged_attention import paged_attention
from grace_vlm.kernels.plain_linear import plain_linear

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
WIDTH, HEADS, LINKS = 2048, Heads(16, 8, 128), 30


class Chain:
    """Layers without end: each link's output is the next one's input, and the allocator gives their memory in turns."""

    def __init__(self, rows: int) -> None:
        self.packed = [pack_linear(weight(4, out, WIDTH, 128, seed=out), GPU) for out in (4096, WIDTH)]
        self.plain = (inputs_of(2 * WIDTH, WIDTH, torch.bfloat16, seed=7) * 0.02).to(GPU)
        self.norm = Norm(torch.ones(WIDTH, dtype=torch.bfloat16, device=GPU), 1e-6)
        self.rows = rows
        angle = torch.rand(rows, 64, generator=torch.Generator().manual_seed(1)).repeat(1, 2).to(GPU)
        self.rotation = (angle.cos().bfloat16(), angle.sin().bfloat16())
        self.table = torch.arange(rows * 8, dtype=torch.int32, device=GPU).view(rows, 8)

    def run(self, x: torch.Tensor, between: bool) -> list[torch.Tensor]:
        """States, chosen tokens and lengths after all links; ``between``: the GPU is waited for after each kernel."""
        wait = torch.cuda.synchronize if between else lambda: None
        cache = [torch.zeros(self.rows * 128, 8, 128, dtype=torch.bfloat16, device=GPU) for _ in range(2)]
        lengths = torch.full((self.rows,), 70, dtype=torch.int32, device=GPU)
        ids, positions = (torch.zeros(self.rows, dtype=torch.int64, device=GPU) for _ in range(2))
        for _ in range(LINKS):
            normed = rms_norm(x, self.norm)
            wait()
            qkv = low_bit_linear(normed, self.packed[0])
            wait()
            attended = paged_attention(qkv, self.rotation, *cache, self.table, lengths, HEADS, 16, 2)
            wait()
            x = low_bit_linear(attended, self.packed[1], residual=x)
            wait()
            opened = gated(plain_linear(x, self.plain)) if self.rows <= 16 else gated(qkv)
            wait()
            x = rms_norm(x + opened, self.norm)
            advance(x, ids, positions, lengths)
            wait()
        return [x, ids, positions, lengths, *cache]


@pytest.mark.skipif(not (torch.cuda.is_available() and starts_early(GPU)), reason="no kernel starts early here")
@pytest.mark.parametrize("rows", [1, 7, 16, 64])
def test_a_chain_is_the_same_as_with_waits(rows: int) -> None:
    """Attention comes soon after what moves lengths on, so it must read them after its wait."""
    chain, x = Chain(rows), inputs_of(rows, WIDTH, torch.bfloat16).to(GPU)
    right = chain.run(x, between=True)
    assert right[0].isfinite().all()
    for _ in range(10):
        for found, expected in zip(chain.run(x, between=False), right, strict=True):
            assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain.run(x, between=False)
    for _ in range(10):
        graph.replay()
        for found, expected in zip(recorded, right, strict=True):
            assert torch.equal(found, expected)
