"""Gates, rotation and attention of a CPU's kernels against their references, and what is left to those.

Values are held to FP64 by test_cpu_fuzz.py.
"""

from __future__ import annotations

import pytest
import torch

from grace_vlm.kernels import decoder_rows_cpu as module
from grace_vlm.kernels.cache_rows import FP8
from grace_vlm.kernels.cpu import why_not
from grace_vlm.kernels.decoder_rows import gated, gated_reference, rotate_append, rotate_append_reference
from grace_vlm.kernels.heads import Heads
from grace_vlm.kernels.paged_attention import paged_attention, paged_attention_reference

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize("width", [16, 48, 1536])
def test_gates(width: int) -> None:
    x = 20 * torch.randn(5, 2 * width)
    assert module.takes_gates(x)
    torch.testing.assert_close(gated(x), gated_reference(x), rtol=1e-5, atol=1e-6)
    # Rows with a gap between them.
    torch.testing.assert_close(gated(x.repeat(1, 2)[:, : 2 * width]), gated_reference(x), rtol=1e-5, atol=1e-6)


def test_gates_that_are_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[inf, nan, 1e4, -1e4] * 4 + [1.0] * 16])
    y = gated(x)[0]
    assert y[0] == inf
    assert y[1].isnan()
    assert y[2] == 1e4
    assert abs(y[3]) < 1e-30


def world(heads: Heads, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """qkv, cos, sin, keys, values, table, lengths of three requests with pages of 16 tokens."""
    rows, width = 3, heads.head_dim
    qkv = torch.randn(rows, (heads.num_heads + 2 * heads.num_kv_heads) * width)
    angle = torch.randn(rows, width // 2).repeat(1, 2)
    keys, values = (torch.randn(10 * 16, heads.num_kv_heads, width).to(dtype) for _ in range(2))
    table = torch.tensor([[3, 1, 9], [2, 8, 8], [7, 4, 5]], dtype=torch.int32)
    return qkv, angle.cos(), angle.sin(), keys, values, table, torch.tensor([40, 0, 16], dtype=torch.int32)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "width"), [(4, 2, 16), (3, 3, 48), (16, 8, 128), (9, 3, 64)])
def test_attention(num_heads: int, num_kv_heads: int, width: int, normed: bool) -> None:
    norms = (torch.rand(width), torch.rand(width), 1e-6) if normed else ()
    heads = Heads(num_heads, num_kv_heads, width, *norms)
    qkv, cos, sin, keys, values, table, lengths = world(heads)
    assert module.takes_heads(qkv, keys, values, heads)
    mine, theirs = [keys.clone(), values.clone()], [keys.clone(), values.clone()]
    found = paged_attention(qkv, (cos, sin), *mine, table, lengths, heads, 16)
    right = paged_attention_reference(qkv, (cos, sin), *theirs, table, lengths, heads, 16)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    slots = torch.tensor([4, 100, 37])
    found, right = (f(qkv, (cos, sin), slots, *kept, heads) for f, kept in
                    ((rotate_append, mine), (rotate_append_reference, theirs)))  # fmt: skip
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "dtype"), [(Heads(2, 1, 24), torch.float32), (Heads(2, 1, 16), FP8),
                                              (Heads(40, 1, 128), torch.float32)])  # fmt: skip
def test_what_is_left_to_the_reference(heads: Heads, dtype: torch.dtype) -> None:
    """Heads of another width, a cache in bytes, more numbers than a thread has room for."""
    qkv, cos, sin, keys, values, table, lengths = world(heads, dtype)
    assert not module.takes_heads(qkv, keys, values, heads)
    out = paged_attention(qkv, (cos, sin), keys, values, table, lengths, heads, 16)
    assert out.shape == (3, heads.num_heads * heads.head_dim)
    assert out.isfinite().all()
    assert not module.takes_gates(torch.zeros(2, 40))
    assert not module.takes_gates(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert gated(torch.ones(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
