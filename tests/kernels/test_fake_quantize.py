"""The Triton grid kernels against quant/affine.py and quant/lsq.py, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from grace_vlm.kernels.fake_quantize import GridTable
from grace_vlm.quant.affine import fake_quantize, quantize, round_scale
from grace_vlm.quant.lsq import lsq_backward
from grace_vlm.quant.scheme import QuantScheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 128), (3, 256), (7, 384), (41, 128), (16, 1280)]


def make(shape: tuple[int, int], scheme: QuantScheme, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(master, log_scale, raw scale, stored scale, gradient); a tenth of the weights lie outside the grid. Scales have
    both signs."""
    generator = torch.Generator().manual_seed(seed)
    groups = (shape[0], shape[1] // scheme.group_size)
    log_scale = (torch.rand(groups, generator=generator) * 3 - 6).to(DEVICE)
    raw = log_scale.exp() * (torch.randint(0, 2, groups, generator=generator) * 2 - 1).to(DEVICE)
    wide = torch.randn(shape, generator=generator).to(DEVICE) * scheme.qmax / 1.6
    master = wide * raw.repeat_interleave(scheme.group_size, dim=1)
    master[0, :4] = torch.tensor([0.0, -0.0, -1e-9, 1e4])
    grad = torch.randn(shape, generator=generator).to(DEVICE)
    return master, log_scale, raw, round_scale(raw, scheme.scale_rounding), grad


def fake_quantize_into(
    leaf: torch.Tensor,
    master: torch.Tensor,
    scale: torch.Tensor,
    scheme: QuantScheme,
    old_scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    return GridTable.of([(leaf, master, master)], scheme).write_leaves(scale, old_scale)


def lsq_backward_in_place(
    grad: torch.Tensor,
    master: torch.Tensor,
    scale: torch.Tensor,
    raw_scale: torch.Tensor,
    scheme: QuantScheme,
    *options: str,
) -> torch.Tensor:
    grad_log_scale = torch.empty_like(scale)
    GridTable.of([(grad, master, grad)], scheme).backward(scale, raw_scale, grad_log_scale, *options)
    return grad_log_scale


def halfway(scheme: QuantScheme, scale: torch.Tensor) -> torch.Tensor:
    """(1, group_size) weights of row 0 that are (k + 1/2) s, where rounding half to even shows."""
    k = torch.arange(scheme.group_size, device=DEVICE) % (2 * scheme.qmax + 5) - scheme.qmax - 2
    return (k + 0.5) * scale[0, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("num_bits", "group_size"), [(4, 128), (8, 128), (2, 64), (3, 32), (4, 16)])
def test_the_leaf_is_torchs_bit_for_bit(shape: tuple[int, int], num_bits: int, group_size: int) -> None:
    scheme = QuantScheme(num_bits, group_size)
    master, _, _, scale, _ = make(shape, scheme)
    master[0, :group_size] = halfway(scheme, scale)
    # FP32 leaves here: the interpreter cuts BF16 where a GPU rounds.
    expected = fake_quantize(master, scale, scheme, value_dtype=None)
    leaf = torch.full_like(master, math.nan)
    fake_quantize_into(leaf, master, scale, scheme)
    assert torch.equal(leaf.view(torch.int32), expected.view(torch.int32))  # -0.0 is not +0.0 here
    if DEVICE == "cuda":
        low = torch.empty_like(master, dtype=torch.bfloat16)
        fake_quantize_into(low, master, scale, scheme)
        assert torch.equal(low.float(), fake_quantize(master, scale, scheme))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip_mask", ["official", "lsq", "pass_through"])
@pytest.mark.parametrize("scale_gradient", ["none", "lsq"])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_the_backward_is_torchs(shape: tuple[int, int], clip_mask: str, scale_gradient: str, num_bits: int) -> None:
    scheme = QuantScheme(num_bits, 128)
    master, log_scale, raw, scale, grad = make(shape, scheme, seed=1)
    expected, expected_scale = lsq_backward(
        grad,
        master,
        log_scale,
        scheme,
        clip_mask,  # type: ignore[arg-type]
        scale_gradient,  # type: ignore[arg-type]
        raw.sign(),
    )
    written = grad.clone()
    grad_log_scale = lsq_backward_in_place(written, master, scale, raw, scheme, clip_mask, scale_gradient)
    assert torch.equal(written, expected)
    assert torch.allclose(grad_log_scale, expected_scale, rtol=1e-5, atol=1e-6 * float(expected_scale.abs().max()))
    if shape[0] > 1 and clip_mask != "pass_through":
        assert bool((written == 0).any())  # some weights are outside


def test_error_of_the_scales_gradient_is_that_of_fp32() -> None:
    scheme = QuantScheme(4, 128)
    master, log_scale, raw, scale, grad = make((64, 512), scheme, seed=2)
    ours = lsq_backward_in_place(grad.clone(), master, scale, raw, scheme)
    _, plain = lsq_backward(grad, master, log_scale, scheme, sign=raw.sign())
    # The same stored scale in FP64: the codes must not move.
    v = (master.double() / scale.double().repeat_interleave(128, 1)).reshape(64, 4, 128)
    q, g = v.round().clamp(-8, 7), grad.double().reshape(64, 4, 128)
    inside = (v.round() >= -8) & (v.round() <= 7)
    exact = (g * (q - v * inside)).sum(-1) * raw.double()
    assert float((ours - exact).norm()) <= 2 * float((plain - exact).norm())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(poison: float) -> None:
    scheme = QuantScheme(4, 128)
    master, log_scale, raw, scale, grad = make((4, 256), scheme)
    for tensor, row in ((master, 1), (grad, 2)):
        tensor[row, 130] = poison
    leaf = torch.empty_like(master)
    fake_quantize_into(leaf, master, scale, scheme)
    expected = fake_quantize(master, scale, scheme, value_dtype=None)
    assert torch.equal(leaf.isnan(), expected.isnan())
    _, expected_scale = lsq_backward(grad, master, log_scale, scheme, sign=raw.sign())
    got = lsq_backward_in_place(grad, master, scale, raw, scheme)
    assert torch.equal(torch.isfinite(got), torch.isfinite(expected_scale))
    assert not bool(torch.isfinite(got[2]).all())


def test_nothing_beyond_the_weight_is_touched() -> None:
    """One group more than a program's share, in buffers that go on with NaN."""
    scheme = QuantScheme(4, 16)
    shape = (257, 16)
    master, _, raw, scale, grad = make(shape, scheme)
    leaf = torch.full((600, 16), math.nan, device=DEVICE)
    wide = torch.full((600, 16), math.nan, device=DEVICE)
    wide[:257] = grad
    fake_quantize_into(leaf[:257], master, scale, scheme)
    lsq_backward_in_place(wide[:257], master, scale, raw, scheme)
    assert bool(torch.isfinite(leaf[:257]).all())
    assert bool(torch.isfinite(wide[:257]).all())
    assert bool(leaf[257:].isnan().all())
    assert bool(wide[257:].isnan().all())


def test_many_weights_in_one_launch_are_each_weight_alone() -> None:
    """Of every size around a program's share, their scales end to end."""
    scheme = QuantScheme(4, 128)
    made = [make(shape, scheme, seed=number) for number, shape in enumerate([*SHAPES, (31, 128), (32, 128), (33, 128)])]
    leaves = [torch.full_like(master, math.nan) for master, *_ in made]
    gradients = [grad.clone() for *_, grad in made]
    table = GridTable.of([(leaf, m[0], g) for leaf, m, g in zip(leaves, made, gradients, strict=True)], scheme)
    raw, scale = (torch.cat([m[i].flatten() for m in made]) for i in (2, 3))
    grad_log_scale = torch.full_like(scale, math.nan)
    table.write_leaves(scale)
    table.backward(scale, raw, grad_log_scale)
    parts = grad_log_scale.split([m[3].numel() for m in made])
    for leaf, gradient, part, (master, _, own_raw, own_scale, grad) in zip(leaves, gradients, parts, made, strict=True):
        assert torch.equal(leaf, fake_quantize(master, own_scale, scheme, value_dtype=None))
        alone = grad.clone()
        assert torch.equal(part, lsq_backward_in_place(alone, master, own_scale, own_raw, scheme).flatten())
        assert torch.equal(gradient, alone)


def test_flipped_codes_are_counted() -> None:
    scheme = QuantScheme(4, 128)
    master, _, _, scale, _ = make((41, 256), scheme)
    leaf = torch.empty_like(master)
    fake_quantize_into(leaf, master, scale, scheme)
    assert int(fake_quantize_into(leaf.clone(), master, scale, scheme, old_scale=scale)) == 0  # type: ignore[arg-type]
    moved, new_scale = master + 0.3 * scale.repeat_interleave(128, 1), round_scale(scale * 1.02, "bf16")
    expected = (quantize(leaf, scale, scheme) != quantize(moved, new_scale, scheme)).sum()
    found = fake_quantize_into(leaf, moved, new_scale, scheme, old_scale=scale)
    assert int(found) == int(expected) > 1000  # type: ignore[arg-type]
    assert torch.equal(leaf, fake_quantize(moved, new_scale, scheme, value_dtype=None))
