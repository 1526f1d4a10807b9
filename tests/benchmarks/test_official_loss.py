"""The peer of bench_loss.py against an FP64 form written apart; what its clamps lose; what its chunks do not bound."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import official_loss as official  # noqa: E402

N, V = 37, 101


def plain_form(
    z: torch.Tensor, y: torch.Tensor, targets: torch.Tensor, temperature: float, a: float, b: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, GDKD) in FP64, token by token, from probabilities of the words; nothing is clamped."""
    entropies, divergences, gates = [], [], []
    for row in range(targets.shape[0]):
        k = int(targets[row])
        student, teacher = z[row].double(), y[row].double()
        entropies.append(-student.log_softmax(0)[k])
        raw = teacher.softmax(0)
        gates.append(torch.exp((raw * raw.log()).sum() / math.log(len(raw))))
        p, q = (student / temperature).softmax(0), (teacher / temperature).softmax(0)
        others = [j for j in range(len(p)) if j != k]
        p_rest, q_rest = p[others].sum(), q[others].sum()
        tckd = q[k] * (q[k] / p[k]).log() + q_rest * (q_rest / p_rest).log()
        p_others, q_others = p[others] / p_rest, q[others] / q_rest
        nckd = (q_others * (q_others / p_others).log()).sum()
        divergences.append(temperature**2 * (a * tckd + b * nckd))
    gate = torch.stack(gates)
    return torch.stack(entropies).mean(), (gate * torch.stack(divergences)).sum() / gate.sum()


def unconfident(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, y = (torch.randn(N, V, generator=generator) for _ in range(2))
    return z, y, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("chunk_size", [1, 10, 2048])
def test_values_and_gradient_are_those_of_the_plain_form(temperature: float, chunk_size: int) -> None:
    z, y, targets = unconfident()
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    weights = {"tckd_weight": 1.5, "nckd_weight": 4.0, "distillation_weight": 0.7}
    total, entropy, gdkd = official.official_loss(
        ours, y, targets, temperature=temperature, chunk_size=chunk_size, **weights
    )
    expected_entropy, expected_gdkd = plain_form(theirs, y, targets, temperature, 1.5, 4.0)
    expected = expected_entropy + 0.7 * expected_gdkd
    for found, wanted in ((total, expected), (entropy, expected_entropy), (gdkd, expected_gdkd)):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)
    total.backward()
    expected.backward()
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-7)


def test_defaults_are_those_of_the_official_script() -> None:
    z, y, targets = unconfident(1)
    entropy, gdkd = plain_form(z, y, targets, 2.0, 1.0, 4.0)
    total, _, _ = official.official_loss(z, y, targets)
    torch.testing.assert_close(total.double(), entropy + gdkd, rtol=2e-6, atol=0)


def test_rows_that_are_not_supervised_have_no_part() -> None:
    z, y, targets = unconfident(2)
    z.requires_grad_()
    marked = targets.clone()
    marked[::3] = -100
    kept = marked != -100
    total, _, _ = official.official_loss(z, y, marked, chunk_size=8)
    expected, _, _ = official.official_loss(z[kept], y[kept], targets[kept])
    torch.testing.assert_close(total, expected)
    total.backward()
    assert z.grad is not None
    assert not z.grad[~kept].any()


def confident_pair(rest_of_student: float, rest_of_teacher: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of two words' sort: (z, y, target) whose probabilities besides the target are as given at T = 2."""
    rows = []
    for rest in (rest_of_student, rest_of_teacher):
        logits = torch.zeros(1, V, dtype=torch.float64)
        logits[0, 0] = 2 * math.log((1 - rest) / rest * (V - 1))
        rows.append(logits.float())
    return rows[0], rows[1], torch.tensor([0])


def tckd_of(z: torch.Tensor, y: torch.Tensor, targets: torch.Tensor) -> float:
    return float(official.binary_divergence(z / 2, y / 2, targets))


def true_tckd(z: torch.Tensor, y: torch.Tensor, targets: torch.Tensor) -> float:
    only_tckd = plain_form(z, y, targets, 2.0, 1.0, 0.0)[1]
    return float(only_tckd) / 4


def test_a_confident_teacher_is_lost_below_the_clamp() -> None:
    """1 - q = 9e-10 against 1 - p = 5e-9: 1 - p is 0 in FP32, both become 1e-8, and nothing is left of TCKD."""
    pair = confident_pair(5e-9, 9e-10)
    assert true_tckd(*pair) > 1e-9
    assert tckd_of(*pair) == 0.0
    z, y, targets = pair
    z.requires_grad_()
    official.official_loss(z, y, targets, nckd_weight=0.0)[2].backward()
    exact = z.detach().double().requires_grad_()
    plain_form(exact, y, targets, 2.0, 1.0, 0.0)[1].backward()
    assert z.grad is not None
    assert exact.grad is not None
    assert z.grad[0, 0] == 0.0, "the gradient at the target is lost too"
    assert float(exact.grad[0, 0]) == pytest.approx(2 * (9e-10 - 5e-9), rel=0.01)


@pytest.mark.parametrize(
    ("rest_of_student", "rest_of_teacher", "error"),
    [(0.3, 0.42, 1e-5), (5e-3, 2.5e-3, 1e-3), (1e-4, 5.7e-5, 0.3)],
)
def test_a_less_confident_teacher_is_only_rounded(rest_of_student: float, rest_of_teacher: float, error: float) -> None:
    pair = confident_pair(rest_of_student, rest_of_teacher)
    assert tckd_of(*pair) == pytest.approx(true_tckd(*pair), rel=error)


def test_the_clamp_stands_in_for_a_student_that_gives_the_rest_nothing() -> None:
    """1 - p = 0 in FP32 counts as 1e-8, so that the divergence stays finite."""
    z, y, targets = confident_pair(1e-12, 0.5)
    expected = 0.5 * math.log(0.5 / 1.0) + 0.5 * math.log(0.5 / 1e-8)
    assert tckd_of(z, y, targets) == pytest.approx(expected, rel=1e-5)
    assert true_tckd(z, y, targets) == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-12), rel=1e-4)


def test_the_gate_lies_between_one_and_a_guess() -> None:
    logits = torch.zeros(2, V)
    logits[1, 3] = 100.0
    gate = official.entropy_gate(logits.requires_grad_())
    torch.testing.assert_close(gate, torch.tensor([math.exp(-1), 1.0]))
    assert not gate.requires_grad


@pytest.mark.parametrize("chunk_size", [16, 64, 1000])
def test_chunks_do_not_bound_what_autograd_keeps(chunk_size: int) -> None:
    """16 bytes a logit: the cross-entropy's log-softmax and 12 of every chunk, however small the chunks are."""
    rows, words = 256, 1000
    z = torch.randn(rows, words).bfloat16().requires_grad_()
    y, targets = torch.randn(rows, words).bfloat16(), torch.randint(words, (rows,))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total, _, _ = official.official_loss(z, y, targets, chunk_size=chunk_size)
    assert total.requires_grad
    assert 16.0 <= sum(kept.values()) / (rows * words) < 16.2


def test_a_step_returns_the_gradients_of_states_and_head() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(N, 8, generator=generator), torch.randn(V, 8, generator=generator)
    teacher_hidden, teacher_head = torch.randn(N, 12, generator=generator), torch.randn(V, 12, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    total, d_hidden, d_head = official.official_step(hidden, head, teacher_hidden, teacher_head, targets)
    h, w = hidden.double().requires_grad_(), head.double().requires_grad_()
    entropy, gdkd = plain_form(h @ w.T, teacher_hidden.double() @ teacher_head.double().T, targets, 2.0, 1.0, 4.0)
    (entropy + gdkd).backward()
    assert h.grad is not None
    assert w.grad is not None
    torch.testing.assert_close(total.double(), (entropy + gdkd).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(d_hidden, h.grad.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(d_head, w.grad.float(), rtol=1e-3, atol=1e-5)
    assert not hidden.requires_grad
    assert hidden.grad is None


def test_a_step_in_bf16_gives_bf16_gradients() -> None:
    hidden, head = torch.randn(5, 8).bfloat16(), torch.randn(V, 8).bfloat16()
    total, d_hidden, d_head = official.official_step(hidden, head, hidden, head, torch.arange(5))
    assert (total.dtype, d_hidden.dtype, d_head.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
