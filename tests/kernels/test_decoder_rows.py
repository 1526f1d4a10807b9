"""Norms, gates, rotation and the cache in Triton (interpreted on a CPU) against torch."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.kernels import decoder_rows as rows
from grace_vlm.kernels import decoder_rows_triton as fused
from grace_vlm.kernels.cache_rows import FP8
from grace_vlm.kernels.decoder_rows import Norm
from grace_vlm.kernels.heads import Heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]

needs_fp8 = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no E4M3 on this GPU"
)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls do not use the kernels, on a GPU neither."""
    monkeypatch.setattr(rows, "runs_triton", lambda *_: False)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), [(1, 96), (7, 128), (33, 2048), (0, 64)])
def test_norm_and_gate(count: int, size: int, dtype: torch.dtype) -> None:
    x, weight = 3 * random(count, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    found, right = fused.rms_norm(x, weight, 1e-6), rows.rms_norm(x, Norm(weight, 1e-6))
    torch.testing.assert_close(found, right, **tolerance)
    torch.testing.assert_close(fused.gated(x), rows.gated(x), **tolerance)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("h", "kv", "d"), [(4, 2, 32), (2, 1, 128), (3, 3, 64)])
def test_rotation_and_the_cache(h: int, kv: int, d: int, has_norm: bool, dtype: torch.dtype) -> None:
    qkv, angle = random(9, (h + 2 * kv) * d, dtype=dtype), torch.rand(9, d // 2).repeat(1, 2).to(DEVICE)
    rotation = (angle.cos().to(dtype), angle.sin().to(dtype))
    norms = {"query_norm": random(d, dtype=dtype, seed=2), "key_norm": random(d, dtype=dtype, seed=3), "epsilon": 1e-6}
    heads = Heads(h, kv, d, **(norms if has_norm else {}))  # type: ignore[arg-type]
    slots = torch.tensor([40, 3, 7, 8, 9, 30, 31, 0, 47], device=DEVICE)
    caches = [torch.full((48, kv, d), float("nan"), dtype=dtype, device=DEVICE) for _ in range(4)]
    found = fused.rotate_append(qkv, rotation, slots, caches[0], caches[1], heads)
    right = rows.rotate_append(qkv, rotation, slots, caches[2], caches[3], heads)
    tolerance = {"atol": 4e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(found, right, **tolerance)
    for ours, theirs in zip(caches[:2], caches[2:], strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
        assert int(ours.isnan().flatten(1).all(1).sum()) == 39


@needs_fp8
@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_a_byte_a_number(dtype: torch.dtype) -> None:
    """Keys and values that are rounded, some past the largest; queries are as with any other cache."""
    h, kv, d = 4, 2, 32
    qkv, angle = 200 * random(9, (h + 2 * kv) * d, dtype=dtype), torch.rand(9, d // 2).repeat(1, 2).to(DEVICE)
    rotation = (angle.cos().to(dtype), angle.sin().to(dtype))
    slots = torch.arange(9, device=DEVICE).flip(0)
    plain = [torch.zeros(12, kv, d, dtype=dtype, device=DEVICE) for _ in range(2)]
    kept = [torch.zeros(12, kv, d, device=DEVICE).to(FP8) for _ in range(2)]
    queries = fused.rotate_append(qkv, rotation, slots, *plain, Heads(h, kv, d))
    assert torch.equal(fused.rotate_append(qkv, rotation, slots, *kept, Heads(h, kv, d)), queries)
    for wide, narrow in zip(plain, kept, strict=True):
        assert wide.abs().max() > 448
        assert narrow.float().abs().max() == 448
        assert torch.equal(narrow.float(), wide.float().clamp(-448, 448).to(FP8).float())
    again = [torch.zeros_like(cache) for cache in kept]
    rows.rotate_append(qkv, rotation, slots, *again, Heads(h, kv, d))
    for ours, theirs in zip(kept, again, strict=True):  # one step of E4M3 where the two rotations round apart
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2.0, rtol=0.13)
        assert (ours.float() != theirs.float()).float().mean() < 0.05
