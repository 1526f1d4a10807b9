"""The Triton AdamW with byte moments against train/adamw8.py, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from grace_vlm.kernels.adamw8 import BLOCK, ROWS, MomentTable, Row
from grace_vlm.train.adamw8 import AdamW8, ByteMoments, Rule, adamw8_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1,), (255,), (256,), (257,), (3, 1000), (ROWS * BLOCK,), (ROWS * BLOCK + 1,), (40, 300)]
RATES = [(1e-2, 0.1), (3e-3, 0.0)]


def rule(step: int, beta1: float = 0.9) -> Rule:
    return Rule.of(beta1, 0.999, 1e-8, step, 0.7)


def make(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Row]:
    """Tensors of every size, with rates and decay of two groups."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for number, shape in enumerate(shapes):
        master = torch.randn(shape, generator=generator).to(DEVICE)
        moments = ByteMoments.zeros(master)
        rows.append((master, torch.zeros_like(master), moments.m, moments.v, moments.scale, *RATES[number % 2]))
    return rows


def set_gradients(rows: list[Row], step: int) -> None:
    """Magnitudes over ten decades; every third element 0, every seventh step none at all."""
    generator = torch.Generator().manual_seed(step)
    for _, gradient, *_ in rows:
        drawn = torch.randn(gradient.shape, generator=generator)
        spread = 10 ** (torch.rand(gradient.shape, generator=torch.Generator().manual_seed(3)) * 10 - 10)
        is_there = torch.rand(gradient.shape, generator=generator) > 1 / 3
        gradient.copy_(drawn * spread * is_there * (step % 7 != 6))


def copy(rows: list[Row]) -> list[Row]:
    return [tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in row) for row in rows]  # type: ignore[misc]


def same(a: list[Row], b: list[Row]) -> bool:
    """Bit for bit, masters, codes and scales."""
    pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one[:5], other[:5], strict=True)]
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)  # type: ignore[union-attr]


def reference(rows: list[Row], at: Rule, skip: torch.Tensor | None = None) -> None:
    first_block = 0
    for master, gradient, m, v, scale, rate, decay in rows:
        adamw8_(master, gradient, ByteMoments(m, v, scale), at, rate, decay, first_block, skip)
        first_block += scale.shape[1]


def test_many_steps_of_many_tensors_are_torchs_bit_for_bit() -> None:
    ours = make(SHAPES)
    theirs = copy(ours)
    table = MomentTable.of(ours)
    for step in range(12):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        table.step(**dataclasses.asdict(rule(step)))
        reference(theirs, rule(step))
        assert same(ours, theirs), step
    codes = torch.cat([row[2].flatten() for row in ours])
    assert len(codes.unique()) > 200


@pytest.mark.parametrize("kind", ["kernel", "torch"])
def test_a_skipped_step_changes_no_byte(kind: str) -> None:
    rows = make(SHAPES)
    table = MomentTable.of(rows)
    set_gradients(rows, 0)
    reference(rows, rule(0))
    before = copy(rows)
    for row in rows:
        row[1].fill_(float("nan"))
    one = torch.ones((), device=DEVICE)
    if kind == "kernel":
        table.step(**dataclasses.asdict(rule(1)), skip=one)
    else:
        reference(rows, rule(1), one)
    for row, old in zip(rows, before, strict=True):
        row[1].copy_(old[1])
    assert same(rows, before)
    other = copy(rows)
    if kind == "kernel":
        table.step(**dataclasses.asdict(rule(1)), skip=one * 0)
    else:
        reference(rows, rule(1), one * 0)
    reference(other, rule(1))
    assert same(rows, other)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(poison: float) -> None:
    rows = make([(3, 256)])
    set_gradients(rows, 0)
    rows[0][1][1, 7] = poison
    MomentTable.of(rows).step(**dataclasses.asdict(rule(0)))
    bad = ~torch.isfinite(rows[0][0])
    assert bool(bad[1, 7])
    assert int(bad.sum()) == 1
    set_gradients(rows, 1)
    MomentTable.of(rows).step(**dataclasses.asdict(rule(1)))
    assert not bool(torch.isfinite(rows[0][0][1, 7]))


def test_nothing_beyond_a_tensor_is_touched() -> None:
    wide = make([(ROWS * BLOCK * 2,)])[0]
    before = copy([wide])[0]
    used = ROWS * BLOCK + 3
    blocks = -(-used // BLOCK)
    scale = torch.full((2 * blocks + 20,), 7.0, device=DEVICE)
    inner: Row = (*(x[:used] for x in wide[:4]), scale[: 2 * blocks].view(2, blocks), 0.1, 0.1)  # type: ignore[assignment]
    inner[4].zero_()
    inner[1].fill_(1.0)
    MomentTable.of([inner]).step(**dataclasses.asdict(rule(0)))
    assert all(torch.equal(x[used:], y[used:]) for x, y in zip(wide[:4], before[:4], strict=True))  # type: ignore[index]
    assert bool((scale[2 * blocks :] == 7.0).all())
    assert not torch.equal(wide[0][:used], before[0][:used])


def test_the_optimizer_launches_it_and_follows_gradients_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for launches in (True, False):
        monkeypatch.setattr("grace_vlm.train.adamw8.runs_triton", lambda *_, launches=launches: launches)
        generator = torch.Generator().manual_seed(0)
        masters = [torch.nn.Parameter(torch.randn(40, 128, generator=generator).to(DEVICE)) for _ in range(3)]
        adam = AdamW8([([(str(i), p) for i, p in enumerate(masters)], 1e-2, 0.1)], 0.9, 0.999, 1e-8)
        for step in range(4):
            kept = [torch.randn(40, 128, generator=generator).to(DEVICE) for _ in masters]
            for p, gradient in zip(masters, kept, strict=True):
                p.grad = gradient
            adam.step(step, 1.0)
        outcomes.append([*(p.detach() for p in masters), *adam.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    """A tensor of 2^31 + 300 elements behind a small one: first, last and in between move alike."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rows = make([(BLOCK,)])
    master = torch.zeros((1 << 31) + 300, device=DEVICE)
    moments = ByteMoments.zeros(master)
    rows.append((master, torch.ones_like(master), moments.m, moments.v, moments.scale, 1e-2, 0.0))
    MomentTable.of(rows).step(**dataclasses.asdict(rule(0)))
    moved = master[:1]
    assert float(moved) < 0
    assert bool((master[:1000] == moved).all())
    assert bool((master[-1000:] == moved).all())
    assert float(master.min()) == float(master.max()) == float(moved)
    assert float(moments.scale.min()) > 0
