"""Attention over pages: Triton (interpreted on a CPU) against torch, and torch against attention over one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grace_vlm.kernels.cache_rows import FP8
from grace_vlm.kernels.decoder_rows import rotate_append_reference
from grace_vlm.kernels.heads import Heads
from grace_vlm.kernels.paged_attention import paged_attention, paged_attention_reference, splits_for
from grace_vlm.kernels.paged_attention_triton import decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
PAGE = 16
needs_fp8 = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no E4M3 on this GPU"
)


def case(h: int, kv: int, d: int, lengths: list[int], has_norm: bool, seed: int = 0):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)

    most = max(lengths) // PAGE + 1
    table = torch.randperm(len(lengths) * most, generator=generator).view(len(lengths), most).int().to(DEVICE)
    angle = torch.rand(len(lengths), d // 2, generator=generator).repeat(1, 2).to(DEVICE)
    norms = {"query_norm": random(d), "key_norm": random(d), "epsilon": 1e-6} if has_norm else {}
    slots = len(lengths) * most * PAGE
    return (
        random(len(lengths), (h + 2 * kv) * d), (angle.cos().to(DTYPE), angle.sin().to(DTYPE)), random(slots, kv, d),
        random(slots, kv, d), table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), Heads(h, kv, d, **norms),
        PAGE,
    )  # fmt: skip


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("h", "kv", "d"), [(4, 2, 32), (2, 2, 64), (6, 1, 128)])
def test_triton_is_torch(h: int, kv: int, d: int, splits: int, has_norm: bool) -> None:
    arguments = case(h, kv, d, [0, 1, 15, 16, 63, 64, 200], has_norm)
    ours, right = ([x.clone() if isinstance(x, torch.Tensor) else x for x in arguments] for _ in range(2))
    found = decode(*ours, splits)
    expected = paged_attention_reference(*right)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if DTYPE is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    for number in (2, 3):  # the cache: one new slot a request, all others as they were
        torch.testing.assert_close(ours[number], right[number], **tolerance)
        assert int((ours[number] != arguments[number]).flatten(1).any(1).sum()) == 7


@needs_fp8
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("h", "kv", "d"), [(4, 2, 32), (6, 1, 128)])
def test_a_cache_of_a_byte_a_number(h: int, kv: int, d: int, splits: int) -> None:
    """Triton against torch, and torch against attention over what the cache has then, widened."""
    qkv, rotation, keys, values, table, lengths, heads, page = case(h, kv, d, [0, 1, 15, 16, 63, 64, 200], False)
    ours, right = ([keys.to(FP8), values.to(FP8)] for _ in range(2))
    found = decode(qkv, rotation, *ours, table, lengths, heads, page, splits)
    expected = paged_attention_reference(qkv, rotation, *right, table, lengths, heads, page)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if DTYPE is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    for kept, theirs, before in zip(ours, right, (keys, values), strict=True):
        assert kept.nbytes * qkv.element_size() == before.nbytes
        is_rounded = before is keys and DTYPE is torch.bfloat16  # in the middle of a rotation, or not
        torch.testing.assert_close(
            kept.float(), theirs.float(), atol=2e-2 if is_rounded else 1e-6, rtol=0.13 if is_rounded else 0
        )
        assert int((kept.float() != before.to(FP8).float()).flatten(1).any(1).sum()) == 7
    query = rotate_append_reference(qkv, rotation, torch.arange(7, device=DEVICE), keys, values, heads)
    for number, length in enumerate(lengths.tolist()):
        token = torch.arange(length + 1, device=DEVICE)
        slots = table[number].long()[token // PAGE] * PAGE + token % PAGE
        own_keys, own_values = (x[slots].to(DTYPE).repeat_interleave(h // kv, dim=1) for x in right)
        weights = (torch.einsum("hd,thd->ht", query[number], own_keys) / d**0.5).float().softmax(dim=-1)
        whole = torch.einsum("ht,thd->hd", weights.to(DTYPE), own_values)
        torch.testing.assert_close(expected[number], whole.flatten(), **tolerance)


def test_a_request_does_not_see_those_beside_it() -> None:
    arguments = case(4, 2, 32, [70, 5, 130], True)
    together = decode(*[x.clone() if isinstance(x, torch.Tensor) else x for x in arguments], 2)
    qkv, (cos, sin), keys, values, table, lengths, heads, page = arguments
    for number in range(3):
        one = slice(number, number + 1)
        own = (qkv[one], (cos[one], sin[one]), keys.clone(), values.clone(), table[one], lengths[one])
        alone = decode(*own, heads, page, 2)
        assert torch.equal(alone[0], together[number])


def test_what_no_request_owns_is_not_read() -> None:
    qkv, rotation, keys, values, table, lengths, heads, page = case(4, 2, 32, [20, 40], False)
    expected = decode(qkv, rotation, keys.clone(), values.clone(), table, lengths, heads, page, 1)
    mine = torch.zeros(len(keys), dtype=torch.bool)
    for number, length in enumerate([20, 40]):
        token = torch.arange(length)
        mine[(table[number].cpu()[token // PAGE] * PAGE + token % PAGE).long()] = True
    keys[~mine.to(DEVICE)] = values[~mine.to(DEVICE)] = float("nan")
    assert torch.equal(decode(qkv, rotation, keys, values, table, lengths, heads, page, 1), expected)


def test_the_reference_is_attention() -> None:
    """Two tokens one after the other, against causal attention over a row of both."""
    heads = Heads(4, 2, 32)
    qkv = torch.randn(3, 8 * 32, generator=torch.Generator().manual_seed(1))
    still = (torch.ones(1, 32), torch.zeros(1, 32))
    keys, values = torch.zeros(32, 2, 32), torch.zeros(32, 2, 32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    found = [
        paged_attention_reference(
            qkv[t : t + 1], still, keys, values, table, torch.tensor([t], dtype=torch.int32), heads, PAGE
        )
        for t in range(3)
    ]
    q, k, v = qkv.view(3, 8, 32).transpose(0, 1).split([4, 2, 2])
    whole = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    torch.testing.assert_close(torch.cat(found), whole.transpose(0, 1).reshape(3, -1))


def test_the_call_is_one_of_the_two() -> None:
    arguments = case(4, 2, 32, [20, 40], False)
    found, right = (
        function(*[x.clone() if isinstance(x, torch.Tensor) else x for x in arguments])
        for function in (paged_attention, paged_attention_reference)
    )
    torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)


def test_shares() -> None:
    assert splits_for(1, 8, 132, 4096) == 32
    assert splits_for(64, 8, 132, 4096) == 2
    assert splits_for(200, 8, 132, 4096) == 1
    assert splits_for(16, 8, 132, 4096) == 2
    assert splits_for(4, 8, 132, 4096) == 8
    assert splits_for(1, 8, 132, 100) == 1
