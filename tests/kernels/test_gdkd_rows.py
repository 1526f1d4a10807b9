"""The Triton rows against the plain ones in FP64: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grace_vlm.kernels.gdkd_rows import entropy_rows, gdkd_rows
from grace_vlm.losses.gdkd import entropy_rows as plain_entropy_rows
from grace_vlm.losses.gdkd_rows import gdkd_rows as plain_gdkd_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: dict[str, Any] = {"temperature": 2.0, "tckd_weight": 1.0, "nckd_weight": 4.0, "decoupled": True}


def randn(*shape: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).to(DEVICE)


def make_rows(num_rows: int, words: int, teacher_words: int | None, seed: int = 0) -> tuple[Any, ...]:
    """(z, y, targets, w, v), with an ignored row, the last word as a target, and rows of weight 0."""
    z = randn(num_rows, words, seed=seed)
    y = None if teacher_words is None else randn(num_rows, teacher_words, seed=seed + 1)
    common = min(words, teacher_words or words)
    generator = torch.Generator().manual_seed(seed + 2)
    targets = torch.randint(0, common, (num_rows,), generator=generator)
    weights = torch.rand(2, num_rows, generator=generator)
    targets[-1] = common - 1
    if num_rows > 3:
        targets[0] = -100
        weights[0, 1], weights[1, 2] = 0.0, 0.0
    return z, y, targets.to(DEVICE), weights[0].to(DEVICE), weights[1].to(DEVICE)


def truth(rows: tuple[Any, ...], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    z, y, targets, w, v = rows
    gradient = torch.empty(z.shape, dtype=torch.float64, device=z.device)
    values = plain_gdkd_rows(
        z.double(), None if y is None else y.double(), targets, w, v, gradient=gradient, **{**OPTIONS, **options}
    )
    return values, gradient


def compare(rows: tuple[Any, ...], block_words: int, tolerance: float = 3e-6, **options: Any) -> None:
    gradient = torch.full_like(rows[0], math.nan)
    chosen = {**OPTIONS, **options}
    values = gdkd_rows(*rows, gradient=gradient, block_words=block_words, num_warps=4, **chosen)
    expected_values, expected = truth(rows, **options)
    assert float((values - expected_values).abs().max()) <= tolerance * max(1.0, float(expected_values.abs().max()))
    assert float((gradient - expected).abs().max()) <= tolerance * max(1e-3, float(expected.abs().max()))
    stats_only = gdkd_rows(*rows, gradient=None, block_words=block_words, num_warps=4, **chosen)
    assert torch.equal(stats_only, values)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5, 2.0, 3.0, 4.0, 7.0])
@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_the_plain_rows(temperature: float, decoupled: bool) -> None:
    compare(make_rows(5, 301, 301), 64, temperature=temperature, decoupled=decoupled)


@pytest.mark.parametrize(
    ("words", "teacher_words"), [(64, 80), (80, 64), (65, 64), (64, 64), (2, 2), (5, 4), (129, None), (200, None)]
)
@pytest.mark.parametrize("block_words", [16, 64, 256])
def test_widths_around_the_blocks(words: int, teacher_words: int | None, block_words: int) -> None:
    compare(make_rows(4, words, teacher_words, seed=words), block_words)


@pytest.mark.parametrize("log_odds", [-30.0, -3.0, 0.0, 5.0, 20.7, 60.0])
def test_confident_teachers_and_students(log_odds: float) -> None:
    """1 - q_k = 1e-9 is log-odds of 20.7."""
    z, y, targets, w, v = make_rows(4, 301, 301, seed=5)
    for logits, more in ((z, 0.3), (y, 0.0)):
        rest = (logits / 2).scatter(1, targets.clamp_min(0).unsqueeze(1), -torch.inf).logsumexp(1, keepdim=True)
        logits.scatter_(1, targets.clamp_min(0).unsqueeze(1), 2 * (rest + log_odds + more))
    rows = (z, y, targets, w * 0.0, v)
    compare(rows, 64)
    gradient = torch.empty_like(z)
    gdkd_rows(*rows, gradient=gradient, block_words=64, num_warps=4, **{**OPTIONS, "nckd_weight": 0.0})
    _, expected = truth(rows, nckd_weight=0.0)
    # FP32 logits of up to 120 carry 4e-6 in u itself.
    row = torch.arange(1, 4, device=DEVICE)
    at_k = (gradient[row, targets[1:]] - expected[row, targets[1:]]) / expected[row, targets[1:]]
    assert float(at_k[v[1:] > 0].abs().max()) < 2e-5


def test_a_word_far_above_the_first_ones_is_read_again() -> None:
    """m is the maximum of the first block: sums of e^(z - m) would overflow at 88 above it."""
    for where in (70, 299):
        for rise in (59.0, 61.0, 95.0, 400.0):
            z, y, targets, w, v = make_rows(4, 301, 301, seed=6)
            targets[:] = 3
            z[1:3, where] += rise
            y[2:, where - 1] += rise
            compare((z, y, targets, w, v), 64, tolerance=2e-5)
            assert torch.allclose(
                entropy_rows(y, block_words=64, num_warps=4).double(), plain_entropy_rows(y.double()), atol=1e-5
            )
            z, targets = z.clone(), targets.clone()
            compare((z, None, targets, w, v), 64, tolerance=2e-5)
            compare((z, y[:, :80].contiguous(), targets, w, v), 64, tolerance=2e-5)


@pytest.mark.parametrize("rise", [17.0, 19.0, 55.0])
def test_at_a_low_temperature_sums_overflow_sooner(rise: float) -> None:
    z, y, targets, w, v = make_rows(4, 301, 301, seed=8)
    targets[:] = 3
    z[1:3, 200] += rise
    y[2:, 199] += rise
    compare((z, y, targets, w, v), 64, tolerance=5e-5, temperature=0.3)


def test_the_gradient_in_bf16_is_the_fp32_one_rounded_once() -> None:
    rows = make_rows(5, 301, 301)
    exact, low = torch.empty_like(rows[0]), torch.empty_like(rows[0], dtype=torch.bfloat16)
    gdkd_rows(*rows, gradient=exact, block_words=64, num_warps=4, **OPTIONS)
    gdkd_rows(*rows, gradient=low, block_words=64, num_warps=4, **OPTIONS)
    if DEVICE == "cuda":
        assert torch.equal(exact.to(torch.bfloat16), low)
    else:  # Triton 3.7's interpreter cuts the digits off.
        assert torch.equal((exact.view(torch.int32) & ~0xFFFF).view(torch.float32), low.float())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_lies_beyond_the_rows_is_neither_read_nor_written(poison: float) -> None:
    rows = make_rows(6, 301, 301)
    clean = torch.empty_like(rows[0])
    values = gdkd_rows(*rows, gradient=clean, block_words=64, num_warps=4, **OPTIONS)
    wide = [torch.full((9, 350), poison, device=DEVICE) for _ in range(3)]
    for buffer, own in zip(wide, (rows[0], rows[1]), strict=False):
        buffer[:6, :301] = own
    z, y, gradient = (buffer[:6, :301] for buffer in wide)
    again = gdkd_rows(z, y, *rows[2:], gradient=gradient, block_words=64, num_warps=4, **OPTIONS)
    assert torch.equal(values, again)
    assert torch.equal(clean, gradient)
    outside = torch.ones(9, 350, dtype=torch.bool, device=DEVICE)
    outside[:6, :301] = False
    expected = torch.full((), poison, device=DEVICE).expand(9, 350)[outside]
    assert torch.equal(wide[2][outside].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(entropy_rows(y, block_words=64, num_warps=4), entropy_rows(rows[1], block_words=64, num_warps=4))


def test_an_ignored_row_may_hold_anything_and_gets_zeros() -> None:
    z, y, targets, w, v = make_rows(4, 100, 100)
    z[0], y[0] = math.nan, math.inf
    gradient = torch.full_like(z, math.nan)
    values = gdkd_rows(z, y, targets, w, v, gradient=gradient, block_words=64, num_warps=4, **OPTIONS)
    assert bool((values[0] == 0).all())
    assert bool((gradient[0] == 0).all())
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("word", [1, 99])
def test_what_is_not_finite_is_not_hidden(poison: float, which: int, word: int) -> None:
    rows = make_rows(4, 100, 100)
    rows[2][1] = 50
    rows[which][1, word] = poison
    gradient = torch.empty_like(rows[0])
    values = gdkd_rows(*rows, gradient=gradient, block_words=64, num_warps=4, **OPTIONS)
    assert not bool(torch.isfinite(values[1]).all())
    assert bool(torch.isfinite(values[2:]).all())
    if which:
        assert not bool(torch.isfinite(entropy_rows(rows[1], block_words=64, num_warps=4)[1]))


def test_a_target_that_the_teacher_lacks_is_nan() -> None:
    z, y, targets, w, v = make_rows(4, 80, 64)
    targets[2] = 70
    values = gdkd_rows(z, y, targets, w, v, gradient=torch.empty_like(z), block_words=64, num_warps=4, **OPTIONS)
    assert bool(torch.isnan(values[2, 1]))
    assert bool(torch.isfinite(values[[1, 3]]).all())


def test_a_target_that_the_student_lacks_is_nan() -> None:
    """And not the word that lies behind the row."""
    z, _, targets, w, v = make_rows(4, 80, None)
    targets[1], targets[3] = 80, 95
    values = gdkd_rows(z, None, targets, w, v, gradient=torch.empty_like(z), block_words=64, num_warps=4, **OPTIONS)
    assert bool(torch.isnan(values[[1, 3], 0]).all())
    assert bool(torch.isfinite(values[2]).all())


def test_the_same_twice_bit_for_bit() -> None:
    rows = make_rows(5, 1001, 1001)
    runs = []
    for _ in range(3):
        gradient = torch.empty_like(rows[0])
        runs.append((gdkd_rows(*rows, gradient=gradient, **OPTIONS), gradient, entropy_rows(rows[1])))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_entropy() -> None:
    y = randn(7, 1000)
    y[1] = 0.0
    y[2, :-1] = -math.inf
    got = entropy_rows(y, block_words=128, num_warps=4)
    assert torch.allclose(got.double(), plain_entropy_rows(y.double()), atol=2e-6)
    assert got[1].item() == pytest.approx(math.log(1000), rel=1e-6)
    assert got[2].item() == 0.0
    assert entropy_rows(y[:0]).shape == (0,)


def test_no_rows() -> None:
    z, y, targets, w, v = make_rows(4, 64, 64)
    empty = gdkd_rows(z[:0], y[:0], targets[:0], w[:0], v[:0], gradient=torch.empty_like(z[:0]), **OPTIONS)
    assert empty.shape == (0, 4)


def test_rows_beyond_two_to_the_31_elements() -> None:
    """Rows far apart in one buffer of more than 2^31 elements; only their pages are ever touched."""
    words, num_rows = 70, 3
    stride = (1 << 31) // 2 + 4096
    rows = make_rows(num_rows, words, words, seed=9)
    far = [
        torch.empty(stride * (num_rows - 1) + words, dtype=dtype, device=DEVICE).as_strided(
            (num_rows, words), (stride, 1)
        )
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    ]
    z, y, gradient = far
    z.copy_(rows[0])
    y.copy_(rows[1])
    near = torch.empty_like(rows[0], dtype=torch.bfloat16)
    expected = gdkd_rows(*rows, gradient=near, block_words=64, num_warps=4, **OPTIONS)
    got = gdkd_rows(z, y, *rows[2:], gradient=gradient, block_words=64, num_warps=4, **OPTIONS)
    assert torch.equal(got, expected)
    assert torch.equal(gradient, near)
    assert torch.equal(entropy_rows(y, block_words=64, num_warps=4), entropy_rows(rows[1], block_words=64, num_warps=4))
