"""linear_gdkd on a GPU, at Qwen3-VL's vocabulary: accuracy, no waiting for the device, memory (make gpu-test)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from grace_vlm.kernels.gdkd_rows import gdkd_rows
from grace_vlm.losses.gdkd import confidence_gate, gated_decoupled_kd
from grace_vlm.losses.gdkd_rows import gdkd_rows as plain_rows
from grace_vlm.losses.linear_gdkd import WORKSPACE_BYTES, linear_gate, linear_gdkd
from grace_vlm.losses.rcka import relational_cka_sum

pytestmark = pytest.mark.gpu
WORDS, D_S, D_T = 151_936, 2048, 4096


@pytest.fixture(scope="module")
def heads() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)
    yield tuple((torch.randn(WORDS, d, device="cuda", generator=generator) * 2 / d**0.5).bfloat16() for d in (D_S, D_T))
    torch.cuda.empty_cache()


def states(num_tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden, teacher_hidden = (
        torch.randn(num_tokens, d, device="cuda", generator=generator).bfloat16() for d in (D_S, D_T)
    )
    return hidden, teacher_hidden, torch.randint(0, WORDS, (num_tokens,), device="cuda", generator=generator)


def plain_loss(
    hidden: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, wide: Any
) -> Any:
    """(loss, logits) from whole logits in ``wide``."""
    logits = hidden.to(wide) @ head.to(wide).T
    gate = confidence_gate(teacher)
    terms = gated_decoupled_kd(logits, teacher, targets, gate=gate)
    return F.cross_entropy(logits, targets) + terms.loss, logits


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_error_is_that_of_one_rounding(heads: tuple[torch.Tensor, torch.Tensor], num_tokens: int) -> None:
    """BF16 states and heads: against FP64, at most twice plain torch with FP32 logits and one rounding of dZ."""
    (head, teacher_head), (hidden, teacher_hidden, targets) = heads, states(num_tokens)
    targets[-1] = WORDS - 1
    errors: dict[str, list[torch.Tensor]] = {}
    for name, wide in (("fp64", torch.float64), ("plain", torch.float32)):
        h, w = hidden.to(wide).requires_grad_(), head.detach().to(wide).requires_grad_()
        loss, logits = plain_loss(h, w, teacher_hidden.to(wide) @ teacher_head.to(wide).T, targets, wide)
        if name == "plain":
            logits.register_hook(lambda grad: grad.bfloat16().float())
        errors[name] = [loss.detach(), *torch.autograd.grad(loss, (h, w))]
        del loss, logits, h, w
    h, w = hidden.clone().requires_grad_(), head.detach().clone().requires_grad_()
    gate = linear_gate(teacher_hidden, teacher_head)
    total = torch.zeros_like(w, dtype=torch.float32)
    terms = linear_gdkd(
        h,
        w,
        targets,
        cross_entropy_weights=1.0 / num_tokens,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        distillation_weights=gate / gate.sum(),
        head_gradient=total,
    )
    terms.loss.backward()
    assert h.grad is not None

    def error(x: torch.Tensor, truth: torch.Tensor) -> float:
        return float((x.double() - truth).norm() / truth.norm())

    truth, plain = errors["fp64"], errors["plain"]
    assert error(terms.loss.detach(), truth[0]) < 1e-5
    # The plain gradient of the states in BF16 as well: that is how autograd hands it on.
    assert error(h.grad, truth[1]) <= 2 * error(plain[1].bfloat16(), truth[1])
    assert error(total, truth[2]) <= 2 * error(plain[2], truth[2])


def test_nothing_waits_for_the_device(heads: tuple[torch.Tensor, torch.Tensor]) -> None:
    (head, teacher_head), (hidden, teacher_hidden, targets) = heads, states(700)
    hidden.requires_grad_()
    total = torch.zeros_like(head, dtype=torch.float32)
    weight = torch.tensor(1 / 700, device="cuda")

    def step() -> None:
        gate = linear_gate(teacher_hidden, teacher_head)
        terms = linear_gdkd(
            hidden,
            head,
            targets,
            cross_entropy_weights=weight,
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            distillation_weights=gate / gate.sum(),
            head_gradient=total,
        )
        terms.loss.backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_tokens", [64, 4096, 8192])
def test_memory_is_the_workspace_and_the_gradients(heads: tuple[torch.Tensor, torch.Tensor], num_tokens: int) -> None:
    (head, teacher_head), (hidden, teacher_hidden, targets) = heads, states(num_tokens)
    hidden.requires_grad_()
    head = head.detach()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gate = linear_gate(teacher_hidden, teacher_head)
    linear_gdkd(
        hidden,
        head,
        targets,
        cross_entropy_weights=1.0 / num_tokens,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        distillation_weights=gate / gate.sum(),
    ).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= WORKSPACE_BYTES + 3 * hidden.numel() * 2 + 100 * num_tokens + 40_000_000


def test_the_same_twice_bit_for_bit(heads: tuple[torch.Tensor, torch.Tensor]) -> None:
    (head, teacher_head), (hidden, teacher_hidden, targets) = heads, states(1500)
    hidden.requires_grad_()
    runs = []
    for _ in range(3):
        hidden.grad, total = None, torch.zeros_like(head, dtype=torch.float32)
        gate = linear_gate(teacher_hidden, teacher_head)
        terms = linear_gdkd(
            hidden,
            head,
            targets,
            cross_entropy_weights=1.0 / 1500,
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            distillation_weights=gate / gate.sum(),
            head_gradient=total,
        )
        terms.loss.backward()
        assert hidden.grad is not None
        runs.append((gate, terms.loss.detach(), hidden.grad, total))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("one_minus_q", [1e-3, 1e-9])
def test_the_targets_gradient_of_confident_models_is_right_to_1e5(one_minus_q: float) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    y = torch.randn(8, WORDS, device="cuda", generator=generator, dtype=torch.float64)
    z = y + 0.7 * torch.randn(8, WORDS, device="cuda", generator=generator, dtype=torch.float64)
    targets = torch.full((8,), 77_091, device="cuda")
    for logits, factor in ((y, 1.0), (z, 3.0)):
        rest = (logits / 2).scatter(1, targets.unsqueeze(1), -torch.inf).logsumexp(1)
        logits[:, 77_091] = 2 * (rest + math.log1p(-factor * one_minus_q) - math.log(factor * one_minus_q))
    z, y = z.float(), y.float()
    weights, none = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    options: dict[str, Any] = {"temperature": 2.0, "tckd_weight": 1.0, "nckd_weight": 4.0, "decoupled": True}
    exact, got = torch.empty_like(z, dtype=torch.float64), torch.empty_like(z)
    plain_rows(z.double(), y.double(), targets, none, weights, gradient=exact, **options)
    gdkd_rows(z, y, targets, none, weights, gradient=got, **options)
    at = slice(None), 77_091
    assert float(((got.double()[at] - exact[at]) / exact[at]).abs().max()) < 1e-5
    assert float((got.double() - exact).norm() / exact.norm()) < 1e-5


def test_the_relation_loss_waits_for_nothing() -> None:
    lengths = [196, 64, 196, 5, 100, 17]
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (torch.randn(sum(lengths), d, device="cuda", generator=generator).bfloat16() for d in (D_S, D_T))
    student.requires_grad_()
    relational_cka_sum(student, teacher, lengths)[0].backward()
    expected, student.grad = student.grad, None
    torch.cuda.set_sync_debug_mode("error")
    try:
        relational_cka_sum(student, teacher, lengths)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert student.grad is not None
    assert torch.equal(student.grad, expected)
    wide = student.detach().cpu().double().requires_grad_()
    relational_cka_sum(wide, teacher.cpu().double(), lengths)[0].backward()
    assert float((student.grad.cpu().double() - wide.grad).norm() / wide.grad.norm()) < 3e-3
